"""Tables 1 to 3 beside the paper's: several runs of one network, aggregated and written out. Pure functions.

Shares and errors are fractions in 0..1, as in result.json; only the paper's own numbers are percent, as printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pipeline.paper import printed
from pipeline.results.tables import NONE, TextTable, percent, short, signed

Json = dict[str, Any]
COLUMNS = ("activation_density", "density", "flops_density")


@dataclass(frozen=True)
class SeedRun:
    """A finished run of one seed; of each layer its number of outputs, and where its Act% was measured."""

    seed: int
    path: str
    result: Json
    outputs: Mapping[str, int]
    measured: Mapping[str, str]


def aggregate(name: str, network: printed.Network, runs: Sequence[SeedRun]) -> Json:
    """The content of result.json: each seed, mean and spread over seeds, and the paper's numbers beside them."""
    seeds = [_seed(run) for run in runs]
    table = {
        "test_error_dense": against([s["test_error"]["dense"] for s in seeds], network.dense_error / 100),
        "test_error_dense_control": against([s["test_error"]["dense_control"] for s in seeds], None),
        "test_error_pruned": against([s["test_error"]["pruned"] for s in seeds], network.pruned_error / 100),
        "drop": against([s["drop"] for s in seeds], (network.pruned_error - network.dense_error) / 100),
        "weights": against([s["weights_total"] for s in seeds], network.weights),
        "weights_kept": against([s["weights_kept"] for s in seeds], network.weights_kept),
        "compression": against([s["compression"] for s in seeds], network.compression),
    }
    reached = [within(network, s["compression"], s["test_error"]["pruned"]) for s in seeds]
    return {
        "name": name,
        "network": network.title,
        "passed": within(network, table["compression"]["mean"], table["test_error_pruned"]["mean"]),
        "seeds_passed": sum(each["both"] for each in reached),
        "limits": {"compression": network.compression, "test_error": network.dense_error / 100},
        "table1": table,
        "layers": layer_rows(network, runs),
        "act_measured": dict(runs[0].measured),
        "test_looks": sum(s["test_looks"] for s in seeds),
        "seconds": sum(s["seconds"] for s in seeds),
        "seeds": seeds,
    }


def within(network: printed.Network, compression: float, test_error: float) -> dict[str, bool]:
    """Whether the paper's row is reached: its compression, at no more error than its dense network."""
    small = compression >= network.compression - 1e-9
    good = test_error <= network.dense_error / 100 + 1e-9
    return {"compression": small, "test_error": good, "both": small and good}


def against(values: Sequence[float | None], theirs: float | None) -> Json:
    """Mean and sample standard deviation of our values, the paper's, and mean - paper's; None where there is none."""
    known = [value for value in values if value is not None]
    mean = fmean(known) if known and len(known) == len(values) else None
    return {
        "mean": mean,
        "std": stdev(known) if mean is not None and len(known) > 1 else None,
        "paper": theirs,
        "difference": None if mean is None or theirs is None else mean - theirs,
    }


def _seed(run: SeedRun) -> Json:
    """One seed's numbers, as its own result.json has them."""
    result, test = run.result, run.result["test"]
    control = test["dense_control"]
    errors = {
        "dense": 1 - test["dense"]["top1"],
        "dense_control": None if control is None else 1 - control["top1"],
        "pruned": 1 - test["pruned"]["top1"],
    }
    val = {part: 1 - result["val"][part]["top1"] for part in ("dense", "pruned")}
    return {
        "seed": run.seed,
        "run": run.path,
        "verdict": result["verdict"],
        "test_error": errors,
        "drop": errors["pruned"] - errors["dense"],
        "val_error": val,
        **{key: result[key] for key in ("compression", "weights_total", "weights_kept", "test_looks")},
        "seconds": sum(value for value in result["seconds"].values() if value is not None),
    }


def layer_rows(network: printed.Network, runs: Sequence[SeedRun]) -> list[Json]:
    """Rows of table 2 or 3, the last one the total; a layer that the paper does not have has None beside it."""
    theirs = {layer.name: layer for layer in network.layers}
    columns = [run.result["layers"] for run in runs]
    rows = []
    for same in zip(*columns, strict=True):
        name = same[0]["name"].removesuffix(".weight")
        shares = {column: [row[column] for row in same] for column in COLUMNS}
        rows.append(_row(name, same[0]["weights"], same[0]["flops"], shares, theirs.get(name)))
    weights, flops = (sum(row[key] for row in columns[0]) for key in ("weights", "flops"))
    shares = {
        "activation_density": [activation_total(run) for run in runs],
        "density": [run.result["density"] for run in runs],
        "flops_density": [run.result["flops_density"] for run in runs],
    }
    return [*rows, _row("total", weights, flops, shares, network.total)]


def activation_total(run: SeedRun) -> float:
    """The share of all layers' outputs that is not zero."""
    layers = run.result["layers"]
    active = sum(run.outputs[row["name"]] * row["activation_density"] for row in layers)
    return float(active / sum(run.outputs[row["name"]] for row in layers))


def _row(name: str, weights: int, flops: int, shares: Mapping[str, list[float]], theirs: printed.Layer | None) -> Json:
    paper_shares = dict.fromkeys(COLUMNS, None) if theirs is None else _shares(theirs)
    return {
        "name": name,
        "weights": {"ours": weights, "paper": theirs and theirs.weights},
        "flops": {"ours": flops, "paper": theirs and theirs.flops},
        **{column: against(shares[column], paper_shares[column]) for column in COLUMNS},
    }


def _shares(layer: printed.Layer) -> dict[str, float | None]:
    printed = (layer.activations, layer.weights_left, layer.flops_left)
    return {column: value / 100 for column, value in zip(COLUMNS, printed, strict=True)}


def tables(found: Json) -> list[TextTable]:
    """Table 1's row and the network's table of layers, ours beside the paper's."""
    network = printed.NETWORKS[found["name"]]
    return [_table1(found, network), _layer_table(found, network)]


def _table1(found: Json, network: printed.Network) -> TextTable:
    seeds, table = found["seeds"], found["table1"]

    def share(label: str, key: str, values: list[float | None]) -> list[str]:
        row = table[key]
        numbers = [percent(value, 2) for value in (*values, row["mean"], row["std"], row["paper"])]
        return [label, *numbers, signed(row["difference"], 2)]

    def plain(label: str, key: str, form: str) -> list[str]:
        row = table[key]
        values = [*(seed[key if key != "weights" else "weights_total"] for seed in seeds), row["mean"], row["std"]]
        shown = [NONE if value is None else form.format(value) for value in (*values, row["paper"])]
        return [label, *shown, form.replace(":", ":+").format(row["difference"])]

    rows = [
        *(
            share(f"test error, {part.replace('_', ' ')}", f"test_error_{part}", [s["test_error"][part] for s in seeds])
            for part in ("dense", "dense_control", "pruned")
        ),
        share("pruned − dense", "drop", [s["drop"] for s in seeds]),
        plain("weights", "weights", "{:,.0f}"),
        plain("weights kept", "weights_kept", "{:,.0f}"),
        plain("compression", "compression", "{:.2f}×"),
        ["verdict", *(seed["verdict"] for seed in seeds), *[NONE] * 4],
    ]
    heads = ["", *(f"seed {seed['seed']}" for seed in seeds), "mean", "std", "paper", "difference"]
    return TextTable(f"Table 1, {network.title}: before and after pruning", heads, rows)


def _layer_table(found: Json, network: printed.Network) -> TextTable:
    heads = ["layer", "weights", "paper", "FLOPs", "paper"]
    for head in ("Act%", "Weights%", "FLOP%"):
        heads += [head, "paper", "diff"]
    rows = []
    for row in found["layers"]:
        cells = [row["name"]]
        for key in ("weights", "flops"):
            cells += [short(row[key]["ours"]), short(row[key]["paper"])]
        for key in COLUMNS:
            value = row[key]
            spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
            cells += [f"{percent(value['mean'])}{spread}", percent(value["paper"], 0), signed(value["difference"])]
        rows.append(cells)
    return TextTable(f"Table {network.table}, {network.title}: what is left of each layer", heads, rows)


def conclusion(found: Json) -> str:
    """Whether the paper's row was reached, in a sentence."""
    limits, table, passed = found["limits"], found["table1"], found["passed"]
    said = {
        "both": "reached",
        "compression": "compression reached, test error not",
        "test_error": "test error reached, compression not",
    }
    words = next((text for key, text in said.items() if passed[key]), "not reached")
    return (
        f"The paper's row (at least {limits['compression']:g}× at no more than {percent(limits['test_error'], 2)} test "
        f"error): {words}. Mean of {len(found['seeds'])} seed(s): {table['compression']['mean']:.2f}× at "
        f"{percent(table['test_error_pruned']['mean'], 2)}; {found['seeds_passed']} of {len(found['seeds'])} reach it "
        "by themselves."
    )


def notes(found: Json) -> list[str]:
    """What a reader must know about the numbers."""
    measured = ", ".join(f"{name.removesuffix('.weight')} {where}" for name, where in found["act_measured"].items())
    return [
        f"Act% is the share of non-zero outputs, measured on val images: {measured}. The total weights layers by their "
        "number of outputs. FLOP% = Weights% × the Act% of what the layer reads.",
        f"Test was looked at {found['test_looks']} time(s), once a seed; every choice was made on val.",
        f"All seeds together took {found['seconds']:.0f} s.",
        "The dense control is the dense network trained on as long as the pruned one; the paper has none. std is the "
        "sample standard deviation over seeds; differences of percentages are in points.",
    ]


def markdown(found: Json, figures: Sequence[tuple[int, str, str]], command: str) -> str:
    """reproduce.md: the conclusion, the tables, and the figures as (number, file name, what ours shows)."""
    parts = [
        f"# {found['network']} beside the paper",
        conclusion(found),
        *(table.markdown() for table in tables(found)),
        "\n".join(f"- {note}" for note in notes(found)),
        *(figure(number, file, text) for number, file, text in figures),
        "## Runs",
        "\n".join(f"- seed {s['seed']}: {s['verdict']}, [report]({s['run']}/report.html)" for s in found["seeds"]),
        f"Made by `{command}`, which goes on where it was stopped and repeats nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def figure(number: int, file: str, text: str) -> str:
    """A section with one figure: what the paper's shows, then ours."""
    return f"## Figure {number}\n\nThe paper's: {printed.FIGURES[number]}\n\n![Figure {number}]({file})\n\nOurs: {text}"
