"""Figure 5 as numbers: five curves of accuracy loss against parameters away, and their order beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.paper import printed
from pipeline.results.tables import TextTable, percent, signed

Json = dict[str, Any]
# The paper's legend, and the measurement that each curve is: (regulariser, prunings of the dense network or the chain
# of rounds, before or after retraining).
CURVES = {
    "L2, retrained": ("l2", "one-shot", "val"),
    "L1, retrained": ("l1", "one-shot", "val"),
    "L1, not retrained": ("l1", "one-shot", "val_before_retrain"),
    "L2, not retrained": ("l2", "one-shot", "val_before_retrain"),
    "L2, iterative prune and retrain": ("l2", "iterative", "val"),
}
HIGH = 0.9  # the share of parameters away from which the paper's iterative curve stands apart
AS_IN_PAPER, REVERSED, MIXED, UNCLEAR = "as in the paper", "the other way round", "mixed", "no clear difference"


def assemble(network: str, seed: int, samples: int, measured: Mapping[str, Json]) -> Json:
    """One network's part of result.json.

    `measured` holds for l1 and l2 the dense val accuracy, and lists of the rounds' metrics.json: {"dense": {"top1"},
    "one-shot": [...], "iterative": [...]}. All losses are against the L2 dense network, on `samples` val images.
    """
    reference = measured["l2"]["dense"]["top1"]
    curves: list[Json] = [
        {"name": name, "points": [_point(reference, each, key) for each in measured[regulariser][kind]]}
        for name, (regulariser, kind, key) in CURVES.items()
    ]
    return {
        "network": network,
        "seed": seed,
        "split": "val",
        "samples": samples,
        "dense_top1": {regulariser: part["dense"]["top1"] for regulariser, part in measured.items()},
        "curves": curves,
        "order": order({curve["name"]: curve["points"] for curve in curves}, samples),
    }


def _point(reference: float, metrics: Json, key: str) -> Json:
    top1 = metrics[key]["top1"]
    return {"density": metrics["density"], "away": 1 - metrics["density"], "top1": top1, "loss": reference - top1}


def order(curves: Mapping[str, list[Json]], samples: int) -> list[Json]:
    """What the paper says of its curves, and what ours say: {"claim", "verdict", "detail"}."""
    high = {name: [point for point in points if point["away"] >= HIGH - 1e-9] for name, points in curves.items()}
    best, *others = "L2, iterative prune and retrain", "L2, retrained", "L1, retrained"
    return [
        _claim("Without retraining, L1 is better than L2", "L1, not retrained", "L2, not retrained", curves, samples),
        _claim("With retraining, L2 is better than L1", "L2, retrained", "L1, retrained", curves, samples),
        *(_claim(f"At {HIGH:.0%} away and more, iterative is better than {o}", best, o, high, samples) for o in others),
    ]


def _claim(claim: str, better: str, worse: str, curves: Mapping[str, list[Json]], samples: int) -> Json:
    found = compare(curves[better], curves[worse], samples)
    wins, losses, gaps = found["wins"], found["losses"], found["gaps"]
    if not gaps:
        return {"claim": claim, "verdict": UNCLEAR, "detail": "no point lies there"}
    if wins and losses:
        verdict = MIXED
    else:
        verdict = AS_IN_PAPER if wins else REVERSED if losses else UNCLEAR
    largest = max(gaps, key=lambda gap: abs(gap[1]))
    detail = (
        f"clearly so at {wins} of {len(gaps)} points, clearly the other way at {losses}; the largest gap is "
        f"{signed(largest[1], 2)} points, with {percent(largest[0])} away"
    )
    return {"claim": claim, "verdict": verdict, "detail": detail}


def compare(better: Sequence[Json], worse: Sequence[Json], samples: int) -> Json:
    """At how many points `better` is clearly better, or clearly worse, and (away, accuracy gap) of each point.

    Clear is a gap of more than two standard errors of a difference of two proportions, taken as independent: on the
    same images they are not, so this errs on the careful side.
    """
    gaps, wins, losses = [], 0, 0
    for one, other in zip(better, worse, strict=True):
        gap = one["top1"] - other["top1"]
        error = math.sqrt(sum(p["top1"] * (1 - p["top1"]) / samples for p in (one, other)))
        wins += gap > 2 * error
        losses += -gap > 2 * error
        gaps.append((one["away"], gap))
    return {"wins": wins, "losses": losses, "gaps": gaps}


def table(part: Json) -> TextTable:
    """Accuracy loss in points, a row a density, a column a curve."""
    curves = part["curves"]
    rows = [
        [percent(points[0]["away"]), *(signed(-point["loss"], 2) for point in points)]
        for points in zip(*(curve["points"] for curve in curves), strict=True)
    ]
    title = f"Figure 5, {printed.NETWORKS[part['network']].title}: change of val accuracy in points"
    return TextTable(title, ["parameters away", *(curve["name"] for curve in curves)], rows)


def sentences(part: Json) -> list[str]:
    """The order of the curves in words."""
    dense = part["dense_top1"]
    said = [f"{row['claim']}: {row['verdict']} ({row['detail']})." for row in part["order"]]
    return [
        *said,
        f"Losses are against the dense network with L2, {percent(dense['l2'], 2)} on val; the one with L1 has "
        f"{percent(dense['l1'], 2)}. One seed ({part['seed']}), {part['samples']:,} val images; test is not looked at.",
    ]


def markdown(found: Json, files: Mapping[str, str], command: str) -> str:
    """reproduce.md of figure 5; `files` holds each network's picture."""
    parts = ["# Figure 5: accuracy loss against parameters away", f"The paper's: {printed.FIGURES[5]}"]
    for part in found["networks"]:
        title = printed.NETWORKS[part["network"]].title
        said = "\n".join(f"- {sentence}" for sentence in sentences(part))
        parts += [f"## {title}", f"![Figure 5, {title}]({files[part['network']]})", said, table(part).markdown()]
        parts.append(f"All points took {part['seconds']:.0f} s.")
    parts.append(f"Made by `{command}`, which goes on where it was stopped and repeats nothing.")
    return "\n\n".join(parts) + "\n"
