"""Whole channels of trained networks: accuracy and measured speed, beside torch-pruning's on the same work.

    SECATEUR_DATA=... python benchmarks/bench_channels.py [--compressions 2,3] [--epochs N] [--runs FOLDER]
        [--networks squeezenet,efficientnet-lite0] [--markdown]

Two ImageNet networks that know Imagenette's ten classes lose channels until 1/compression of the FLOPs is left. Ours go
in four rounds, scored by Taylor, with reconstruction and distillation. torch-pruning takes the norms of the trained
weights' groups, in one step, and is then retrained by the same loop, from the labels. All have the same number of
epochs, the same rate and batch: ours, torch-pruning's and the dense control, which keeps all its channels. Errors are
on Imagenette's 800 val images, with 95% intervals. Milliseconds are medians on one core, by turns in one process. Needs
the package torch-pruning 1.6.1, and for EfficientNet-Lite0 efficientnet-lite-pytorch 0.1.0. What lies in FOLDER is not
done again, so a command that was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from ten_classes import NETWORKS, SAMPLE, flops, torch_pruned, trained
from torch import Tensor, nn

from pipeline import stages
from pipeline.base.stats import wilson
from pipeline.cli.console import show_tables
from pipeline.cli.display import Display
from pipeline.cli.messages import make_console
from pipeline.export import export, latency
from pipeline.export.load import compact_of
from pipeline.local import LocalEngine
from pipeline.results.tables import TextTable
from pipeline.run import state
from pipeline.settings.config import Config, parse_config
from pipeline.train import checkpoint
from pipeline.train.session import open_session
from pipeline.train.world import World, configure_process

ALONE = World(0, 1, torch.device("cpu"))
ROUNDS, BATCHES, THREADS = 4, (1, 64), 1
PLACES = [(engine, n) for engine in ("torch", "ORT") for n in BATCHES]
TRAINING = {"batch_size": 32, "lr": 0.0007, "weight_decay": 1e-4, "schedule": "cosine", "channels_last": True}
COLUMNS = [
    "network",
    "channels by",
    "FLOPs",
    "test error",
    "verdict",
    "torch ms, 1 / 64",
    "ORT ms, 1 / 64",
    "times faster",
]


class Session(nn.Module):
    """A network in onnxruntime, on one thread, to be timed as others are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = THREADS
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            export.to_onnx(network, torch.zeros(2, *SAMPLE), path)
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        """Its outputs for images (batch, 3, 224, 224)."""
        return torch.from_numpy(self._session.run(["output"], {"input": x.numpy()})[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-channels"), help="a second call goes on there")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--compressions", default="2,3")
    parser.add_argument("--epochs", type=int, default=4, help="of each, in all; ours has a quarter in each round")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if "SECATEUR_DATA" not in os.environ:
        sys.exit("set SECATEUR_DATA to the folder that holds weights/ and imagenette-224-subset.tar")
    configure_process(THREADS)
    rows: list[list[str]] = []
    with Display(make_console(stderr=True)) as display:
        for name in given.networks.split(","):
            for compression in map(float, given.compressions.split(",")):
                rows += compared(name, compression, given.epochs, given.runs.resolve(), display)
    table = TextTable(f"channels, {given.epochs} epochs of retraining", COLUMNS, rows)
    if given.markdown:
        print(table.markdown())
    else:
        show_tables([table], [])


def compared(name: str, compression: float, epochs: int, runs: Path, display: Display) -> Iterator[list[str]]:
    """Rows of the table: the dense control, ours and torch-pruning's."""
    config = ours(name, compression, epochs, runs)
    with state.open_run(config) as here:
        driver = stages.Driver(config, LocalEngine(ALONE), here, display)
        stages.carry_out(stages.up_to(config, stages.ROUNDS, stages.FINAL), driver)
    result = here.load(stages.Result, "result.json")
    peer, right, samples = theirs(name, compression, epochs, runs, display)
    networks = {"none": trained(name), "secateur": compact_of(here.root, trust_code=True), "torch-pruning": peer}
    times = measured(networks)
    control = result.test.dense_control
    assert control is not None
    errors = {
        "none": (round(control.top1 * samples), "-"),
        "secateur": (round(result.test.pruned.top1 * samples), result.verdict),
        "torch-pruning": (right, "-"),
    }
    for form, network in networks.items():
        count, verdict = errors[form]
        low, high = wilson(count, samples)
        yield [
            f"{name} {compression:g}x", form, f"{flops(network) / flops(networks['none']):.3f}",
            f"{1 - count / samples:.2%} ({1 - high:.2%} to {1 - low:.2%})", verdict,
            *(" / ".join(f"{times[engine, form, n]:.1f}" for n in BATCHES) for engine in ("torch", "ORT")),
            " / ".join(f"{times[engine, 'none', n] / times[engine, form, n]:.2f}" for engine, n in PLACES),
        ]  # fmt: skip


def theirs(name: str, compression: float, epochs: int, runs: Path, display: Display) -> tuple[nn.Module, int, int]:
    """torch-pruning's network after the retraining, how many test images it knows, and of how many."""
    common = base(name, f"torch-pruning-{name}-{compression:g}", runs, "torch_pruned", compression=compression)
    config = parsed(common, dense={**TRAINING, "epochs": epochs})
    with state.open_run(config) as here:
        stages.carry_out([stages.SHARDS, stages.DENSE], stages.Driver(config, LocalEngine(ALONE), here, display))
        network = torch_pruned(name, compression)
        network.load_state_dict(checkpoint.load(here, "dense/checkpoint").weights)
        answers = open_session(config, ALONE, here, display).evaluate(network.eval(), "test")
    return network, int((answers.right & answers.valid).sum()), int(answers.valid.sum())


def measured(networks: dict[str, nn.Module]) -> dict[tuple[str, str, int], float]:
    """Milliseconds of a pass by engine, network and batch."""
    forms: dict[str, dict[str, nn.Module]] = {
        "torch": networks,
        "ORT": {form: Session(network) for form, network in networks.items()},
    }
    return {
        (engine, row.name, row.batch): row.median_ms
        for engine, each in forms.items()
        for row in latency.measure(each, SAMPLE, BATCHES, THREADS, latency.Passes(seconds=60))
    }


def ours(name: str, compression: float, epochs: int, runs: Path) -> Config:
    """The config of our run."""
    return parsed(
        base(name, f"secateur-{name}-{compression:g}", runs, "trained"),
        dense={"epochs": 0},
        prune={
            "pattern": "channels", "criterion": "taylor", "allocation": "pooled", "rounds": ROUNDS,
            "reconstruct_samples": 100, "shrink_between_rounds": True,
        },
        retrain={**TRAINING, "epochs": epochs // ROUNDS, "distill": 0.5},
        target={"compression": compression, "budget": "flops", "margin": 0.02},
    )  # fmt: skip


def base(name: str, run: str, runs: Path, factory: str, **given: float) -> dict[str, Any]:
    """What both have: data and network."""
    network = NETWORKS[name]
    return {
        "name": run, "threads": THREADS, "device": "cpu", "runs_dir": str(runs), "tracking": {"enabled": False},
        "data": {
            "source": "folder", "root": f"{os.environ['SECATEUR_DATA']}/imagenette-224-subset.tar", "channels": 3,
            "size": SAMPLE[-1], "mean": network.mean, "std": network.std, "augment": ["flip"], "shard_samples": 500,
            "eval_batch": 50,
        },
        "model": {"factory": f"ten_classes:{factory}", "kwargs": {"name": name, **given}, "trained": True},
    }  # fmt: skip


def parsed(config: dict[str, Any], **sections: dict[str, Any]) -> Config:
    """The config with more sections."""
    return parse_config({**config, **sections})


if __name__ == "__main__":
    main()
