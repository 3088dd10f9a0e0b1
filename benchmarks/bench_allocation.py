"""The allocation solved from the scan against uniform, pooled, ERK and the paper's: same dense network, same recipe.

    SECATEUR_DATA=... python benchmarks/bench_allocation.py [--runs FOLDER] [--seeds 0,1,2]
        [--networks lenet-300-100,lenet-5,squeezenet] [--set KEY=VALUE ...]
        [--allocations budget,uniform,pooled,erk,paper] [--markdown]

For each seed one dense network is trained and scanned. Each allocation then prunes it at once to each density, without
retraining ("before"), and in rounds with a few epochs of retraining in each ("after"), with the same batches for all.
On val alone; test is not looked at. The difference of `budget` to the best of the others is paired by image and pooled
over the seeds, with Tango's 95% interval: what it does not hold is that another retraining would come out a little
different. What lies in FOLDER is not measured again, so a command that was stopped goes on.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import stages, storage
from pipeline.base import stats
from pipeline.cli.console import show_tables
from pipeline.cli.display import Display
from pipeline.cli.messages import make_console
from pipeline.local import LocalEngine
from pipeline.results.tables import TextTable, percent, signed
from pipeline.rounds import attempts, method
from pipeline.rounds.subject import open_subject
from pipeline.run import state
from pipeline.run.state import Run
from pipeline.settings.config import Config, load_config
from pipeline.train import checkpoint
from pipeline.train.session import Session, open_session
from pipeline.train.world import World, configure_process

ALONE = World(0, 1, torch.device("cpu"))
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SOLVED, OTHERS = "budget", ("uniform", "pooled", "erk", "paper")
COMMON = ["threads=1", "device=cpu", "tracking.enabled=false", "prune.dense_control=false", "prune.schedule=list"]
DENSITIES = "prune.list=[0.2, 0.1, 0.05, 0.03, 0.02]"
LEVELS = "scan.levels=[.8, .6, .5, .4, .3, .2, .15, .1, .07, .05, .03, .02, .01, .007, .005, .003, .002]"
# Of each network: its config, what it is given besides, and the seeds at most.
NETWORKS: dict[str, tuple[str, list[str], int]] = {
    "lenet-300-100": ("lenet-300-100.yaml", ["data.root={data}/mnist", DENSITIES, LEVELS, "retrain.epochs=6"], 3),
    "lenet-5": ("paper/lenet-5.yaml", ["data.root={data}/mnist", DENSITIES, LEVELS, "retrain.epochs=2"], 3),
    "squeezenet": (
        "squeezenet-imagenette.yaml",
        [
            "data.root={data}/imagenette-224-subset.tar", "data.class_index={data}/imagenet_class_index.json",
            "model.checkpoint={data}/weights/squeezenet1_1_imagenet.pth", "prune.list=[0.5, 0.33]",
            "scan.levels=[0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]",
        ],
        1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Whether each val image was answered right, shape (images,), by density: pruned at once, and in rounds."""

    before: dict[float, NDArray[np.bool_]]
    after: dict[float, NDArray[np.bool_]]
    densities: dict[float, dict[str, float]]  # of each tensor, in rounds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-allocation"), help="a second call goes on there")
    parser.add_argument("--networks", default="lenet-300-100")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--allocations", default=",".join((SOLVED, *OTHERS)))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, as of retraining")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if "SECATEUR_DATA" not in os.environ:
        sys.exit("set SECATEUR_DATA to the folder that holds mnist/ and imagenette-224-subset.tar")
    runs = given.runs.resolve()
    for network in given.networks.split(","):
        seeds = [int(seed) for seed in given.seeds.split(",")][: NETWORKS[network][2]]
        found: dict[str, list[Measured]] = {}
        with Display(make_console(stderr=True)) as display:
            for seed in seeds:
                base = make_config(network, seed, runs, [f"name=seed-{seed}", f"prune.allocation={SOLVED}"])
                configure_process(base.threads)
                prepare(base, display)
                for allocation in given.allocations.split(","):
                    display.line(f"{network}, seed {seed}, {allocation}")
                    found.setdefault(allocation, []).append(
                        measure(network, seed, runs, base, allocation, given.set, display)
                    )
        made = tables(network, seeds, found)
        if given.markdown:
            print(*(table.markdown() for table in made), sep="\n\n", end="\n\n")
        else:
            show_tables(made, [])


def make_config(network: str, seed: int, runs: Path, more: list[str]) -> Config:
    """The config of a network's run, given the data's place."""
    path, overrides, _ = NETWORKS[network]
    here = [text.replace("{data}", os.environ["SECATEUR_DATA"]) for text in overrides]
    return load_config(CONFIGS / path, [*COMMON, *here, f"seed={seed}", f"runs_dir={runs / network}", *more])


def prepare(config: Config, progress: Any) -> None:
    """Shards, the dense network and its scan, shared by all allocations."""
    engine = LocalEngine(ALONE)
    with state.open_run(config) as here:
        stages.carry_out(stages.up_to(config, stages.SCAN), stages.Driver(config, engine, here, progress))


def measure(
    network: str, seed: int, runs: Path, base: Config, allocation: str, more: list[str], progress: Any
) -> Measured:
    """One allocation of one seed, in a run of its own beside the base's."""
    shared = Run(state.run_root(base), 0)
    data = ["data.source=shards", f"data.root={shared.path('shards')}"]
    named = [f"name={base.name}-{allocation}", f"prune.allocation={allocation}"]
    config = make_config(network, seed, runs, [*data, *named, *more])
    with state.open_run(config) as here:
        checkpoint.save(here, "dense/checkpoint", checkpoint.load(shared, "dense/checkpoint"))
        here.commit(shared.read("scan", "scan.json"), "scan", "scan.json")
        session = open_session(config, ALONE, here, progress)
        return prune(session)


def prune(session: Session) -> Measured:
    """Every density at once from the dense network, then all in rounds."""
    found = Measured({}, {}, {})
    subject, dense = open_subject(session), checkpoint.load(session.run, "dense/checkpoint")
    goals = attempts.outlook(subject)
    for goal in goals:
        density, name = goal.density, f"before-{goal.round:02d}.npy"
        if not session.run.has("answers", name):
            subject.load(dense)
            plan = method.plan_round(subject, subject.everything, goal, {})
            method.apply_masks(subject.model, method.shared_masks(subject, plan, subject.everything, {}))
        found.before[density] = answers(session, subject.model, name)
    subject.load(dense)
    alive = subject.everything
    for goal in goals:
        alive = method.one_round(subject, alive, goal)
        found.after[goal.density] = answers(session, subject.model, f"after-{goal.round:02d}.npy")
        found.densities[goal.density] = {name: float(mask.float().mean()) for name, mask in alive.items()}
    return found


def answers(session: Session, model: torch.nn.Module, name: str) -> NDArray[np.bool_]:
    """Which of val's readable images the model gets right; kept in the run."""
    if session.run.has("answers", name):
        right = np.load(io.BytesIO(storage.read_bytes(session.run.path("answers", name))), allow_pickle=False)
        return np.asarray(right, dtype=np.bool_)
    given = session.evaluate(model, "val")
    right = given.right[given.valid]
    buffer = io.BytesIO()
    np.save(buffer, right, allow_pickle=False)
    session.run.commit_bytes(buffer.getvalue(), "answers", name)
    return right


def tables(network: str, seeds: list[int], found: dict[str, list[Measured]]) -> list[TextTable]:
    """Accuracy before and after retraining, a row a density, and the densities that `budget` chose."""
    made = []
    for what, title in (("before", "before retraining, at once"), ("after", "after retraining, in rounds")):
        pooled = {name: {d: np.concatenate([getattr(m, what)[d] for m in each]) for d in getattr(each[0], what)}
                  for name, each in found.items()}  # fmt: skip
        rows = []
        for density in next(iter(pooled.values())):
            right = {name: by_density[density] for name, by_density in pooled.items()}
            cells = [percent(density), *(percent(float(each.mean()), 2) for each in right.values())]
            rows.append([*cells, *against_best(right)])
        columns = ["density", *found, "budget against the best other (points)", "verdict"]
        images = len(next(iter(right.values())))
        made.append(TextTable(f"{network}, {title}: val top-1, seeds {seeds}, {images:,} answers", columns, rows))
    rows = [
        [percent(density), name, " ".join(f"{tensor}={percent(value, 2)}" for tensor, value in tensors.items())]
        for name, each in found.items()
        for density, tensors in each[0].densities.items()
    ]
    return [*made, TextTable(f"{network}: density of each tensor, seed {seeds[0]}", ["density", "", "tensors"], rows)]


def against_best(right: dict[str, NDArray[np.bool_]]) -> list[str]:
    """The paired difference of `budget` to the best of the others with its interval, and what it says."""
    others = {name: each for name, each in right.items() if name != SOLVED}
    if SOLVED not in right or not others:
        return ["", ""]
    best = max(others, key=lambda name: others[name].mean())
    won, lost = (right[SOLVED] & ~others[best]).sum(), (others[best] & ~right[SOLVED]).sum()
    low, high = stats.tango(int(won), int(lost), len(right[SOLVED]))  # of what is won over the other
    verdict = "best" if low > 0 else "worse" if high < 0 else "not distinguishable"
    gain = (int(won) - int(lost)) / len(right[SOLVED])
    return [f"{signed(gain, 2)} ({signed(low, 2)} to {signed(high, 2)}) on {best}", verdict]


if __name__ == "__main__":
    main()
