"""The end of a run: its final files, the verdict, result.json and the report."""

from __future__ import annotations

import gzip
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Literal

import numpy as np
from safetensors.torch import save as save_safetensors
from torch import Tensor

from pipeline import storage
from pipeline.base import stats
from pipeline.base.version import VERSION
from pipeline.export import packed
from pipeline.network import cost
from pipeline.network.build import build_network
from pipeline.network.survey import Prunable
from pipeline.network.weights import stored_once
from pipeline.results import card, report
from pipeline.rounds import attempts, branch
from pipeline.run.layout import CODEBOOK, DENSE, handed_over, standing, trail
from pipeline.run.records import (
    CodebookMetrics,
    DataFacts,
    DenseMetrics,
    Histograms,
    LayerActivity,
    RoundMetrics,
    RoundPlan,
    TestMetrics,
    WeightHistogram,
)
from pipeline.run.result import (
    LatencySummary,
    LayerResult,
    Lineage,
    MlflowPlace,
    OnTest,
    OnVal,
    Paired,
    Result,
    RoundResult,
    Scores,
    StageSeconds,
    StoredBytes,
)
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.task.answers import Marks
from pipeline.task.feed import Feed
from pipeline.train import checkpoint

HISTOGRAM_BINS = 80
GIVES = ("final/model.safetensors", "final/model.packed", "final/histograms.json", "result.json", "report.html")
PACKAGES = ("torch", "torchvision", "ray", "webdataset", "mlflow", "boto3", "numpy")


def finish(config: Config, here: Run, prunable: list[Prunable], started: float) -> Result:
    """Write final/, result.json, report.html and the model card; returns the result.

    `started` is of time.monotonic().
    """
    folder = handed_over(here)
    kept = attempts.standing_checkpoint(here, prunable, config, folder)
    dense = checkpoint.load(here, "dense/checkpoint")
    model_bytes = save_safetensors(kept.weights)
    here.commit_bytes(model_bytes, "final", "model.safetensors")
    model = build_network(config.model, here.load(DataFacts, "data.json").classes, config.seed)
    once = stored_once(model, kept.weights)
    same = once.keys() == kept.weights.keys()  # nothing is tied
    sizes = packed.write(
        here.path("final", "model.packed"), once, check=here.check_fence, shared_values=folder == CODEBOOK
    )
    here.commit(histograms(prunable, dense.weights, kept), "final", "histograms.json")
    stored = StoredBytes(
        dense_fp32=sum(tensor.numel() * tensor.element_size() for tensor in once.values()),
        packed=sizes.total,
        packed_index=sizes.index,
        packed_bound=sizes.bound,
        dense_gzip=len(gzip.compress(model_bytes if same else save_safetensors(once), 6, mtime=0)),
    )
    counted = cost.count(model, Feed.of(config).shape)
    flops = {name: found for name, found in counted.by_tensor.items() if name not in counted.uncounted}
    result = assemble(config, here, layer_rows(here, prunable, kept.masks, flops, sizes), stored)
    seconds = result.seconds.model_copy(update={"final": round(time.monotonic() - started, 3)})
    result = result.model_copy(update={"seconds": seconds})
    write_result(here, result)
    return result


def update(here: Run, *, mlflow: MlflowPlace | None = None, latency_ms: LatencySummary | None = None) -> Result:
    """Fill fields of result.json that are known later, and render the report again; None leaves one as it is."""
    known = {name: value for name, value in (("mlflow", mlflow), ("latency_ms", latency_ms)) if value is not None}
    result = here.load(Result, "result.json").model_copy(update=known)
    write_result(here, result)
    return result


def write_result(here: Run, result: Result) -> None:
    """Write result.json, and render the report and the model card from it."""
    here.commit(result, "result.json")
    report.write(here.root, here.check_fence)
    card.write(here.root, here.check_fence)


def assemble(config: Config, here: Run, layers: Sequence[LayerResult], stored: StoredBytes) -> Result:
    """The content of result.json; what is not built or not measured is None."""
    test = here.load(TestMetrics, "final", "test.json")
    folder = handed_over(here)
    on_test = of_test(here, test)
    known = [
        (row.flops, row.flops_density, row.density)
        for row in layers
        if row.flops is not None and row.flops_density is not None
    ]
    flops = sum(count for count, *_ in known) if len(known) == len(layers) else 0
    left_flops = sum(count * share for count, share, _ in known)
    left_by_weights = sum(count * density for count, _, density in known)
    total, left = sum(layer.weights for layer in layers), sum(layer.kept for layer in layers)
    start = branch.begun(here)
    return Result(
        name=config.name,
        network=config.model.factory,
        seed=config.seed,
        verdict=judgement(on_test, folder == DENSE, config.target.margin),
        test_looks=len(storage.read_bytes(here.path("test_looks.jsonl")).splitlines()),
        weights_total=total,
        weights_kept=left,
        compression=total / left,
        density=left / total,
        flops_density=left_flops / flops if flops else None,
        flops_density_weights=left_by_weights / flops if flops else None,
        val=OnVal(dense=val_scores(here, DENSE), pruned=val_scores(here, folder)),
        test=on_test,
        layers=tuple(layers),
        bytes=stored,
        latency_ms=None,
        rounds=tuple(RoundResult.of(metrics) for metrics in trail(here)),
        lineage=None if start is None else Lineage.of(start),
        seconds=StageSeconds(
            shards=stage_seconds(here, "shards"),
            dense=stage_seconds(here, "dense"),
            scan=stage_seconds(here, "scan"),
            rounds=stage_seconds(here, "rounds"),
            final=stage_seconds(here, "final"),
        ),
        mlflow=None,
        versions={
            "secateur": VERSION,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    )


def val_scores(here: Run, folder: str) -> Scores:
    """How the network in `folder` answers val: the dense one, that of a round, or that with shared values."""
    if folder == DENSE:
        return Scores.of(here.load(DenseMetrics, folder, "metrics.json").val)
    if folder == CODEBOOK:
        return Scores.of(here.load(CodebookMetrics, folder, "metrics.json").val)
    return Scores.of(here.load(RoundMetrics, folder, "metrics.json").val)


def judgement(test: OnTest, unpruned: bool, margin: float) -> Literal["no loss", "undecided", "loss"]:
    """The verdict. Where the dense network guesses there is no accuracy to lose, so nothing was shown.

    A network that is the dense one to the bit has lost nothing, however few images there are to show it.
    """
    if unpruned and not test.guessing:
        return "no loss"
    found = stats.verdict(*test.mcnemar.drop_ci95, margin)
    return "undecided" if test.guessing and found == "no loss" else found


def of_test(here: Run, test: TestMetrics) -> OnTest:
    """The one evaluation on test, with its paired comparisons."""
    trained_on = test.dense_control is not None
    return OnTest(
        samples=test.samples,
        dense=Scores.of(test.dense),
        dense_control=None if test.dense_control is None else Scores.of(test.dense_control),
        pruned=Scores.of(test.pruned),
        mcnemar=paired(here, "dense_control" if trained_on else "dense"),
        against_dense=paired(here, "dense") if trained_on else None,
        largest_class=test.largest_class,
    )


def layer_rows(
    here: Run,
    prunable: list[Prunable],
    masks: Mapping[str, Tensor],
    flops: Mapping[str, int],
    sizes: packed.PackedSizes,
) -> list[LayerResult]:
    """One row a prunable tensor of the network as it stands, in the paper's columns; `flops` are those when dense.

    flops_density = density x input density (tables 2 to 5). What could not be counted or measured is None.
    """
    folder = standing(here)
    thresholds: dict[str, float | None] = {}
    if folder != DENSE:
        plan = here.load(RoundPlan, folder, "plan.json")
        thresholds = {tensor.name: tensor.threshold for tensor in plan.tensors}
    rows = LayerActivity.all_from_json(here.read("final", "activity.json"), here.path("final", "activity.json"))
    activity = {row.name: row for row in rows}
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    density = {tensor.name: kept[tensor.name] / tensor.weights for tensor in prunable}
    return [
        LayerResult(
            name=tensor.name,
            kind=tensor.kind,
            weights=tensor.weights,
            kept=kept[tensor.name],
            density=density[tensor.name],
            flops=flops.get(tensor.name),
            activation_density=activity[tensor.name].output_density,
            flops_density=None
            if (read := activity[tensor.name].input_density) is None
            else read * density[tensor.name],
            threshold=thresholds.get(tensor.name),
            packed_bits_per_kept=sizes.bits_per_kept.get(tensor.name),
            packed_index_bits_per_kept=sizes.index_bits_per_kept.get(tensor.name),
            packed_bound_bits_per_kept=sizes.bound_per_kept.get(tensor.name),
        )
        for tensor in prunable
    ]


def paired(here: Run, reference: str) -> Paired:
    """The paired comparison of pruned against the reference on the readable test samples."""
    saved = storage.read_bytes(here.path("final", "test_answers.npz"))
    before, after = Marks.load(saved, reference), Marks.load(saved, "pruned")
    judged = stats.mcnemar(before.right[after.valid], after.right[after.valid])
    return Paired(
        only_dense_right=judged.only_reference_right,
        only_pruned_right=judged.only_pruned_right,
        p_value=judged.p_value,
        drop_ci95=judged.drop_ci95,
    )


def histograms(prunable: list[Prunable], dense: dict[str, Tensor], kept: checkpoint.Checkpoint) -> Histograms:
    """Each tensor's weights before pruning and, of those kept, after (figure 7)."""
    rows = []
    for tensor in prunable:
        before = dense[tensor.name].flatten().double().numpy()
        after = kept.weights[tensor.name][kept.masks[tensor.name]].flatten().double().numpy()
        reach = float(np.quantile(np.abs(np.concatenate([before, after])), 0.999)) or 1.0
        edges = np.linspace(-reach, reach, HISTOGRAM_BINS + 1)
        counts = [tuple(np.histogram(part, edges)[0].tolist()) for part in (before, after)]
        rows.append(WeightHistogram(tensor.name, tuple(edges.tolist()), *counts))
    return Histograms(tuple(rows))


def stage_seconds(here: Run, stage: str) -> float | None:
    """Seconds that a finished stage took, or None where it was not run."""
    marker = here.marker(stage)
    return None if marker is None else marker.seconds
