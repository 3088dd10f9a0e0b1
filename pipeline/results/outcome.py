"""What came of a run, in words and numbers: for the terminal, the report and MLflow."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import storage
from pipeline.base import stats
from pipeline.results.words import NOT_MEASURED, better, count, number, percent, points, size, span
from pipeline.run.contents import Contents
from pipeline.run.result import LatencySummary, OnTest, Result, Scores
from pipeline.settings import trust

FEW_CLASSES = 10  # top-5 of so many classes is nearly always right
_FEW = 5000  # test images; below, an error is told to a tenth of a percent


def sentence(result: Result) -> str:
    """What came of a run, in one sentence: size, error, accuracy against the network it came from, FLOPs, speed."""
    if unpruned(result):
        return "Nothing was pruned: the network handed over is the dense one."
    test = result.test
    wrong = percent(1 - test.pruned.top1, 1 if test.samples < _FEW else 2)
    parts = [f"{_smaller_network(result)} at {wrong} error, {_against(test)}"]
    if result.flops_density_weights:
        fewer = 1 / result.flops_density_weights
        parts.append(f"{number(fewer, 2)}× fewer FLOPs" if fewer >= 1.05 else "as many FLOPs")
    parts.append(_speed(result.latency_ms))
    return f"{'; '.join(parts)}."


def _smaller_network(result: Result) -> str:
    """The compression; where tensors that are not pruned hold much of the network, also that of all its numbers."""
    others = max(0, result.bytes.dense_fp32 // 4 - result.weights_total)
    whole = (result.weights_total + others) / (result.weights_kept + others)
    if whole >= 0.8 * result.compression:
        return f"{number(result.compression)}× smaller"
    return f"{number(result.compression)}× fewer prunable weights, {number(whole, 2)}× fewer in all,"


def _against(test: OnTest) -> str:
    """The pruned network beside the one it came from, with the paired 95% interval of the difference."""
    low, high = (test.against_dense or test.mcnemar).drop_ci95
    gained = test.pruned.top1 - test.dense.top1
    amount = f"{100 * abs(gained):.2g} points"
    said = f"{amount} {'better' if gained > 0 else 'worse'} than" if abs(gained) >= 5e-5 else "as accurate as"
    interval = "" if test.against_dense is None and test.dense_control is not None else f" ({span(-high, -low)})"
    return f"{said} the network it came from{interval}"


def _speed(latency: LatencySummary | None) -> str:
    if latency is None or latency.dense is None:
        return "its speed is not measured yet (secateur bench)"
    if (latency.verdict or "").startswith("no faster"):
        return f"no faster on {latency.device}"
    best = min(value for value in (latency.pruned, latency.compact, latency.dense) if value)
    gained = "no" if best * 1.05 > latency.dense else f"{number(latency.dense / best, 2)}×"
    return f"{gained} faster on {latency.device} at batch {latency.batch}"  # other batches and forms may differ


def repeat_command(run: Contents, folder: str) -> str:
    """The command that makes the run in `folder` again, beside it; with --trust-code where its network needs that."""
    trusted = " --trust-code" if trust.needs_trust(run.config.model) else ""
    return f"secateur run {storage.join(folder, 'config.yaml')} name={run.run.name}-again{trusted}"


def summary_rows(result: Result, margin: float, classes: int | None = None) -> list[tuple[str, str]]:
    """What a run found, as (label, value) for the terminal and the top of the report.

    `margin` is as for `verdict`. Of networks that tell few `classes` apart, the top-5 error says nothing.
    """
    test, stored, start = result.test, result.bytes, result.lineage
    low, high = test.mcnemar.drop_ci95
    return [
        *([("started from", f"round {start.round} of {start.run}")] if start else []),
        ("verdict", result.verdict),
        *([("why", undecided(result, margin))] if result.verdict == "undecided" and not test.guessing else []),
        ("compression", f"{number(result.compression)}×"),
        ("weights kept", f"{count(result.weights_kept)} of {count(result.weights_total)}"),
        ("FLOPs left, by weights", percent(result.flops_density_weights, 1)),
        ("FLOPs left, zero inputs skipped too", percent(result.flops_density, 1)),
        ("test error, dense", error(test.dense, test.samples, classes)),
        (
            "test error, dense control",
            error(test.dense_control, test.samples, classes) if test.dense_control else NOT_MEASURED,
        ),
        ("test error, pruned", error(test.pruned, test.samples, classes)),
        (f"against {reference_name(result)}", f"{better(drop(result))} (95% of the drop: {span(low, high)})"),
        *_against_given(test),
        ("size, dense fp32", size(stored.dense_fp32)),
        ("size, pruned and gzipped", _smaller(stored.dense_gzip, stored.dense_fp32)),
        ("size, packed", _smaller(stored.packed, stored.dense_fp32)),
        *_bits(result),
        ("latency", _latency(result.latency_ms)),
        ("looks at test", str(result.test_looks)),
    ]


def rows_of(run: Contents, result: Result) -> list[tuple[str, str]]:
    """The `summary_rows` of a finished run, by its folder's content."""
    return summary_rows(result, run.config.target.margin, None if run.data is None else run.data.classes)


def _against_given(test: OnTest) -> list[tuple[str, str]]:
    """The drop against the dense network as it was before the rounds, where the verdict rests on the dense control."""
    if test.against_dense is None:
        return []
    lost, (low, high) = test.dense.top1 - test.pruned.top1, test.against_dense.drop_ci95
    return [("against the dense network before the rounds", f"{better(lost)} (95% of the drop: {span(low, high)})")]


def _bits(result: Result) -> list[tuple[str, str]]:
    """Where values are shared, the packed bits of a kept weight: its value, its place, and the entropy of both."""
    if result.bytes.packed_bound is None or not result.weights_kept:
        return []
    total, index = (
        sum((getattr(layer, name) or 0.0) * layer.kept for layer in result.layers) / result.weights_kept
        for name in ("packed_bits_per_kept", "packed_index_bits_per_kept")
    )
    bounds = [(layer.packed_bound_bits_per_kept, layer.kept) for layer in result.layers if layer.kept]
    known = [bound * kept for bound, kept in bounds if bound is not None]
    entropy = number(sum(known) / result.weights_kept) if len(known) == len(bounds) else NOT_MEASURED
    text = f"{number(total)}: value {number(total - index)}, place {number(index)} (entropy of both {entropy})"
    return [("bits of a kept weight, packed", text)]


def drop(result: Result) -> float:
    """Top-1 on test that pruning cost, a fraction; negative where the pruned network is better."""
    return result.test.reference.top1 - result.test.pruned.top1


def reference_name(result: Result) -> str:
    """What the pruned network was judged against."""
    return "dense control" if result.test.dense_control else "dense"


@dataclass(frozen=True)
class Verdict:
    """The verdict in plain words, and what it rests on."""

    title: str
    text: str


def verdict(result: Result, margin: float) -> Verdict:
    """The verdict in plain words; `margin` is the drop that the run was asked to stay within, a fraction."""
    low, high = result.test.mcnemar.drop_ci95
    limit, interval = f"the margin of {points(margin, sign='')}", span(low, high)
    if result.test.guessing:
        share = percent(result.test.largest_class, 1)
        return Verdict(
            "The dense network guesses",
            f"It is right on {percent(result.test.dense.top1, 1)} of test, and always naming the largest class is "
            f"right on {share}: its 95% interval does not lie above that. So there was no accuracy that pruning could "
            "lose. Check model.checkpoint, data.mean and data.std, the order of the classes, or train for longer.",
        )
    if unpruned(result):
        return Verdict(
            "Nothing was pruned",
            "No round was accepted: each one lost more on val than target.tolerance, down to the smallest step. The "
            "network handed over is the dense one as it was.",
        )
    if result.verdict == "no loss":
        text = f"Even the upper end of the drop's 95% interval ({interval}) is within {limit}."
        if low > 0:
            text += " The interval lies above zero: there is a drop, small enough to be within what was allowed."
        return Verdict("No loss of accuracy", text)
    if result.verdict == "loss":
        text = f"The drop's 95% interval ({interval}) lies wholly above zero: the pruned network is less accurate."
        return Verdict("Accuracy was lost", text)
    return Verdict(
        "Undecided",
        f"The drop's 95% interval ({interval}) holds zero but reaches past {limit}: the test neither shows a loss "
        f"nor rules one out that matters. {more_images(result, margin)}",
    )


def round_up(value: int) -> int:
    """A number of images to two digits, upwards: 1234 as 1300."""
    step = 10 ** max(0, len(str(value)) - 2)
    return -(-value // step) * step


def more_images(result: Result, margin: float) -> str:
    """About how many more test images would decide."""
    paired, samples = result.test.mcnemar, result.test.samples
    wanted = stats.deciding(paired.only_dense_right, paired.only_pruned_right, samples, margin)
    if wanted is None:
        return "No number of test images that could be had would decide: less pruning, or another margin, would."
    return (
        f"About {count(round_up(wanted - samples))} more test images that go like these {count(samples)} would decide."
    )


def undecided(result: Result, margin: float) -> str:
    """Why a verdict is undecided, and what would decide it, in a line."""
    low, high = result.test.mcnemar.drop_ci95
    may = f"the drop may be {points(low)} or {points(high)}, and {points(margin, sign='')} matter"
    return f"{may}. {more_images(result, margin)}"


def unpruned(result: Result) -> bool:
    """Whether a campaign ended with the network that it began with: its dense one, or one that was given sparse."""
    begun = result.lineage
    own = begun is None or begun.kept == begun.weights
    tried = bool(result.rounds) or result.weights_kept == result.weights_total
    return own and tried and not any(row.accepted for row in result.rounds)


def error(scores: Scores, samples: int, classes: int | None = None) -> str:
    """Top-1 error with its own 95% interval (Wilson's), and top-5 error where it was measured and says something."""
    low, high = stats.wilson(round((1 - scores.top1) * samples), samples)
    text = f"{percent(1 - scores.top1)} ({percent(low)} to {percent(high)})"
    shown = scores.top5 is not None and (classes is None or classes > FEW_CLASSES)
    return text + (f", top-5 {percent(1 - scores.top5)}" if shown and scores.top5 is not None else "")


def _smaller(value: int | None, whole: int) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{size(value)} ({number(whole / value)}× smaller)" if value else size(value)


def _latency(latency: LatencySummary | None) -> str:
    if latency is None:
        return NOT_MEASURED
    measured = {"dense": latency.dense, "pruned": latency.pruned, "compact": latency.compact}
    parts = [f"{name} {number(value)} ms" for name, value in measured.items() if value]
    said = f"; {latency.verdict}" if latency.verdict else ""
    return f"{', '.join(parts)} on {latency.device}, batch {latency.batch}{said}"
