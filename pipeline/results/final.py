"""The end of a run: the files handed over, the verdict, result.json and the report."""

from __future__ import annotations

import gzip
import platform
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from safetensors.torch import save as save_safetensors
from torch import Tensor

from pipeline import storage
from pipeline.base import stats
from pipeline.data import shards
from pipeline.export import packed
from pipeline.network import cost
from pipeline.network.build import build_network
from pipeline.network.survey import Prunable
from pipeline.results import report, schema
from pipeline.rounds import attempts, branch
from pipeline.run.layout import DENSE, standing, trail
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.task.answers import Marks
from pipeline.train import checkpoint, session

HISTOGRAM_BINS = 80
PACKAGES = ("torch", "torchvision", "ray", "webdataset", "mlflow", "boto3", "numpy")
STAGES = ("shards", "dense", "scan", "rounds")


def finish(config: Config, here: Run, prunable: list[Prunable], started: float) -> dict[str, Any]:
    """Write final/, result.json and report.html; returns the result. `started` is of time.monotonic()."""
    kept = attempts.standing_checkpoint(here, prunable)
    dense = checkpoint.load(here, "dense/checkpoint")
    model_bytes = save_safetensors(kept.weights)
    here.commit_bytes(model_bytes, "final", "model.safetensors")
    here.check_fence()
    sizes = packed.write(here.path("final", "model.packed"), kept.weights)
    here.commit(histograms(prunable, dense.weights, kept), "final", "histograms.json")
    dense_bytes = sum(tensor.numel() * tensor.element_size() for tensor in dense.weights.values())
    result = assemble(config, here, prunable, kept.masks, sizes, model_bytes, dense_bytes)
    result["seconds"]["final"] = round(time.monotonic() - started, 3)
    write_result(here, result)
    return result


def update(here: Run, **fields: Any) -> dict[str, Any]:
    """Fill fields of result.json that are known later (mlflow, latency_ms), and render the report again."""
    result: dict[str, Any] = {**here.read("result.json"), **fields}
    write_result(here, result)
    return result


def write_result(here: Run, result: dict[str, Any]) -> None:
    """Check result.json against its schema, write it, and render the report from it."""
    schema.validate(result)
    here.commit(result, "result.json")
    report.write(here.root)


def assemble(
    config: Config,
    here: Run,
    prunable: list[Prunable],
    masks: dict[str, Tensor],
    sizes: packed.PackedSizes,
    model_bytes: bytes,
    dense_bytes: int,
) -> dict[str, Any]:
    """The content of result.json; what is not built or not measured is null."""
    test = here.read("final", "test.json")
    tried, folder = trail(here), standing(here)
    judged = mcnemar(here, "dense_control" if "dense_control" in test else "dense")
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    layers = layer_rows(config, here, prunable, folder, kept, sizes)
    flops = sum(row["flops"] for row in layers)
    total, left = sum(mask.numel() for mask in masks.values()), sum(kept.values())
    # A network that is the dense one to the bit has lost nothing, however few images there are to show it.
    same = folder == DENSE
    return {
        "name": config.name,
        "network": config.model.factory,
        "seed": config.seed,
        "verdict": "no loss" if same else stats.verdict(*judged.drop_ci95, config.target.margin),
        "test_looks": len(storage.read_bytes(here.path("test_looks.jsonl")).splitlines()),
        "weights_total": total,
        "weights_kept": left,
        "compression": total / left,
        "density": left / total,
        "flops_density": sum(row["flops"] * row["flops_density"] for row in layers) / flops if flops else None,
        "val": {"dense": here.read("dense", "metrics.json")["val"], "pruned": here.read(folder, "metrics.json")["val"]},
        "test": {
            "samples": test["samples"],
            "dense": test["dense"],
            "dense_control": test.get("dense_control"),
            "pruned": test["pruned"],
            "mcnemar": {
                "only_dense_right": judged.only_reference_right,
                "only_pruned_right": judged.only_pruned_right,
                "p_value": judged.p_value,
                "drop_ci95": list(judged.drop_ci95),
            },
        },
        "layers": layers,
        "bytes": {
            "dense_fp32": dense_bytes,
            "packed": sizes.total,
            "packed_index": sizes.index,
            "dense_gzip": len(gzip.compress(model_bytes, 6, mtime=0)),
        },
        "latency_ms": None,
        "rounds": [
            {
                "round": each.round,
                "attempt": each.attempt,
                "planned_density": each.planned_density,
                "density": each.density,
                "accepted": each.accepted,
                "val_top1": each.val.top1,
                "seconds": each.seconds,
            }
            for each in tried
        ],
        "lineage": lineage(here),
        "seconds": {stage: stage_seconds(here, stage) for stage in (*STAGES, "final")},
        "mlflow": None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def lineage(here: Run) -> dict[str, Any] | None:
    """Where a branch began, and whom it descends from; None for a run with a dense network of its own."""
    start = branch.begun(here)
    return None if start is None else {key: value for key, value in start.to_json().items() if key != "retrain"}


def layer_rows(
    config: Config, here: Run, prunable: list[Prunable], folder: str, kept: dict[str, int], sizes: packed.PackedSizes
) -> list[dict[str, Any]]:
    """One row a prunable tensor of the network in `folder`, in the paper's columns.

    flops_density = density x input density (tables 2 to 5).
    """
    plan = {"tensors": []} if folder == DENSE else here.read(folder, "plan.json")
    thresholds = {row["name"]: row["threshold"] for row in plan["tensors"]}
    activity = {row["name"]: row for row in here.read("final", "activity.json")}
    manifest = shards.load_manifest(session.data_root(config, here))
    model = build_network(config.model, manifest.num_classes, config.seed)
    flops = cost.flops(model, session.input_shape(config))
    return [
        {
            "name": tensor.name,
            "kind": tensor.kind,
            "weights": tensor.weights,
            "kept": kept[tensor.name],
            "density": kept[tensor.name] / tensor.weights,
            "flops": flops[tensor.name],
            "activation_density": activity[tensor.name]["output_density"],
            "flops_density": kept[tensor.name] / tensor.weights * activity[tensor.name]["input_density"],
            "threshold": thresholds.get(tensor.name),
            "packed_bits_per_kept": sizes.bits_per_kept.get(tensor.name),
        }
        for tensor in prunable
    ]


def mcnemar(here: Run, reference: str) -> stats.McNemar:
    """The paired comparison of pruned against the reference on the readable test samples."""
    saved = storage.read_bytes(here.path("final", "test_answers.npz"))
    before, after = Marks.load(saved, reference), Marks.load(saved, "pruned")
    return stats.mcnemar(before.right[after.valid], after.right[after.valid])


def histograms(prunable: list[Prunable], dense: dict[str, Tensor], kept: checkpoint.Checkpoint) -> dict[str, Any]:
    """Each tensor's weights before pruning and, of those kept, after (figure 7)."""
    rows = []
    for tensor in prunable:
        before = dense[tensor.name].flatten().double().numpy()
        after = kept.weights[tensor.name][kept.masks[tensor.name]].flatten().double().numpy()
        reach = float(np.quantile(np.abs(np.concatenate([before, after])), 0.999)) or 1.0
        edges = np.linspace(-reach, reach, HISTOGRAM_BINS + 1)
        rows.append(
            {
                "name": tensor.name,
                "edges": edges.tolist(),
                "before": np.histogram(before, edges)[0].tolist(),
                "after": np.histogram(after, edges)[0].tolist(),
            }
        )
    return {"tensors": rows}


def stage_seconds(here: Run, stage: str) -> float | None:
    """Seconds that a finished stage took, or None where it was not run."""
    if not here.has(stage, "finished.json"):
        return None
    return float(here.read(stage, "finished.json")["seconds"])
