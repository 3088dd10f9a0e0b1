"""result.json, the contract for scripts: every field with its bounds. result.schema.json is made from it.

Unlike other documents it is read strictly: no field more or less, and no number of another kind.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.base import stats
from pipeline.base.errors import UserError
from pipeline.base.record import Record
from pipeline.run.records import Evaluation, RoundMetrics, StartFacts

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]
Amount = Annotated[float, Field(ge=0)]
Times = Annotated[float, Field(ge=1)]


class Part(BaseModel):
    """A part of result.json. What was not measured is null."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Scores(Part):
    """How one network answers one split."""

    top1: Share
    top5: Share | None
    loss: Amount
    top1_present: Share | None = Field(
        None,
        description="Top-1 among the classes that the data holds, where it holds fewer than the network tells apart.",
    )

    @classmethod
    def of(cls, found: Evaluation) -> Scores:
        """What was measured."""
        return cls(top1=found.top1, top5=found.top5, loss=found.loss, top1_present=found.top1_present)


class OnVal(Part):
    """Both networks on val."""

    dense: Scores
    pruned: Scores


class Paired(Part):
    """The pruned network against a reference, image by image on test."""

    only_dense_right: Count = Field(
        description="Samples that only the reference gets right. That of mcnemar is dense_control, or dense where "
        "that is null; that of against_dense is dense."
    )
    only_pruned_right: Count
    p_value: Share
    drop_ci95: tuple[Difference, Difference] = Field(description="95% interval of reference top1 minus pruned top1.")


class OnTest(Part):
    """All networks on test."""

    samples: Number
    dense: Scores
    dense_control: Scores | None
    pruned: Scores
    mcnemar: Paired
    against_dense: Paired | None = Field(
        None, description="The pruned network against the dense one as it was given, where mcnemar has dense_control."
    )
    largest_class: Share | None = Field(
        None, description="Share of the largest class: what always naming one class would get right."
    )

    @property
    def guessing(self) -> bool:
        """Whether the dense network is no better than naming always the largest class, by its 95% interval."""
        if self.largest_class is None:
            return False
        return stats.guessing(round(self.dense.top1 * self.samples), self.samples, self.largest_class)

    @property
    def reference(self) -> Scores:
        """What the pruned network is judged against."""
        return self.dense_control or self.dense


class LayerResult(Part):
    """One prunable tensor, in the columns of the paper's tables."""

    name: Text
    kind: str
    weights: Count
    kept: Count
    density: Share
    flops: Count | None = Field(description="Of one sample; a multiply and an add are two.")
    activation_density: Share | None
    flops_density: Share | None
    threshold: float | None = Field(
        description="The score under which weights went; of some criteria it is below 0. Null where "
        "prune.pattern has no one threshold."
    )
    packed_bits_per_kept: Amount | None
    packed_index_bits_per_kept: Amount | None = Field(None, description="Of these, the bits for the weights' places.")
    packed_bound_bits_per_kept: Amount | None = Field(
        None,
        description="The entropy of order zero of places and shared values; null where the tensor shares none. Rows "
        "and columns without weights can bring the file below it.",
    )


class StoredBytes(Part):
    """Sizes of files."""

    dense_fp32: Count
    packed: Count | None
    packed_index: Count | None
    packed_bound: Count | None = Field(
        None, description="The entropy of all tensors with shared values, in bytes, and the rest of the file as it is."
    )
    dense_gzip: Count | None


class LatencySummary(Part):
    """Milliseconds of a forward pass."""

    device: str
    batch: Number
    dense: Amount | None
    pruned: Amount | None
    compact: Amount | None
    verdict: str | None


class RoundResult(Part):
    """One attempt at a round."""

    round: Number
    attempt: Number
    planned_density: Share
    density: Share
    accepted: bool
    val_top1: Share
    seconds: Amount

    @classmethod
    def of(cls, metrics: RoundMetrics) -> RoundResult:
        """What the attempt measured."""
        return cls(
            round=metrics.round,
            attempt=metrics.attempt,
            planned_density=metrics.planned_density,
            density=metrics.density,
            accepted=metrics.accepted,
            val_top1=metrics.val.top1,
            seconds=metrics.seconds,
        )


class LineageRun(Part):
    """A run that this one descends from, and the round that was left it at."""

    run: str
    uid: str
    round: Count


class Lineage(Part):
    """The run and round that this run began from (start.from); null where it trained a dense network of its own."""

    run: Text
    path: str
    uid: str
    round: Count = Field(description="0 is its dense network.")
    generation: Count = Field(
        description="Accepted rounds from the dense network up to there, of all runs of the lineage."
    )
    weights: Count
    kept: Count
    density: Share
    compression: Times
    mlflow_run_id: str | None
    ancestors: tuple[LineageRun, ...] = Field(
        description="The runs that it descends from in turn, the first one first."
    )

    @classmethod
    def of(cls, start: StartFacts) -> Lineage:
        """Where a branch began."""
        return cls(
            run=start.run,
            path=start.path,
            uid=start.uid,
            round=start.round,
            generation=start.generation,
            weights=start.weights,
            kept=start.kept,
            density=start.density,
            compression=start.compression,
            mlflow_run_id=start.mlflow_run_id,
            ancestors=tuple(LineageRun(run=each.run, uid=each.uid, round=each.round) for each in start.ancestors),
        )


class StageSeconds(Part):
    """How long each stage took; null where it was not run."""

    shards: Amount | None
    dense: Amount | None
    scan: Amount | None
    rounds: Amount | None
    final: Amount | None


class MlflowPlace(Part):
    """Where MLflow holds the run. The URI is without any user name and password."""

    tracking_uri: str
    run_id: str


class Result(Part, Record):
    """What a finished run found. Accuracies, densities and drops are fractions; what was not measured is null."""

    name: Text
    network: Text
    seed: Count
    verdict: Literal["no loss", "undecided", "loss"] = Field(
        description="On test, pruned against mcnemar's reference. Never `no loss` where the dense network guesses."
    )
    test_looks: Count = Field(description="How often test has been looked at in this run.")
    weights_total: Count = Field(description="Prunable weights: matrices and kernels, no biases or norms.")
    weights_kept: Count
    compression: Times = Field(description="weights_total / weights_kept")
    density: Share
    flops_density: Share | None = Field(description="FLOPs left where zero weights and zero inputs are skipped.")
    flops_density_weights: Share | None = Field(
        None, description="FLOPs left where zero weights are skipped; older results lack it."
    )
    val: OnVal
    test: OnTest
    layers: tuple[LayerResult, ...]
    bytes: StoredBytes
    latency_ms: LatencySummary | None
    rounds: tuple[RoundResult, ...]
    lineage: Lineage | None = None  # older results lack it
    seconds: StageSeconds
    mlflow: MlflowPlace | None
    versions: dict[str, str | None]

    @classmethod
    def from_json(cls, document: Any, origin: str) -> Self:
        """The result that a document holds. Raises UserError, which names `origin` and every place that is wrong."""
        try:
            return cls.model_validate_json(json.dumps(document))  # as JSON, where a list may become a tuple
        except ValidationError as error:
            problems = []
            for problem in error.errors():
                place, said = [str(part) for part in problem["loc"]], problem["msg"].lower()
                if problem["type"] in ("missing", "extra_forbidden") and place:
                    key = place.pop()
                    said = f"{key} is missing" if problem["type"] == "missing" else f"{key} is not known"
                problems.append(f"{'/'.join(place) or '(top)'}: {said}")
            raise UserError(
                f"'{origin}' breaks its contract: {'; '.join(problems)}; delete it and run the same command again"
            ) from error


def schema() -> dict[str, Any]:
    """The content of result.schema.json."""
    made = {**Result.model_json_schema(), "title": "secateur result.json"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
