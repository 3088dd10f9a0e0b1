"""Tables 1 to 3 beside the paper's, and the page that holds them, written out. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.paper import printed
from pipeline.paper.seeds import Against, NetworkFound
from pipeline.results.tables import NONE, TextTable, percent, short, signed


def tables(found: NetworkFound) -> list[TextTable]:
    """Table 1's row and the network's table of layers, ours beside the paper's."""
    network = printed.NETWORKS[found.name]
    return [_table1(found, network), _layer_table(found, network)]


def _table1(found: NetworkFound, network: printed.Network) -> TextTable:
    seeds, table = found.seeds, found.table1

    def share(label: str, row: Against, values: Sequence[float | None]) -> list[str]:
        numbers = [percent(value, 2) for value in (*values, row.mean, row.std, row.paper)]
        return [label, *numbers, signed(row.difference, 2)]

    def plain(label: str, row: Against, values: Sequence[float], form: str) -> list[str]:
        shown = [NONE if value is None else form.format(value) for value in (*values, row.mean, row.std, row.paper)]
        return [label, *shown, form.replace(":", ":+").format(row.difference)]

    rows = [
        share("test error, dense", table.test_error_dense, [seed.test_error.dense for seed in seeds]),
        share(
            "test error, dense control",
            table.test_error_dense_control,
            [seed.test_error.dense_control for seed in seeds],
        ),
        share("test error, pruned", table.test_error_pruned, [seed.test_error.pruned for seed in seeds]),
        share("pruned − dense", table.drop, [seed.drop for seed in seeds]),
        plain("weights", table.weights, [seed.weights_total for seed in seeds], "{:,.0f}"),
        plain("weights kept", table.weights_kept, [seed.weights_kept for seed in seeds], "{:,.0f}"),
        plain("compression", table.compression, [seed.compression for seed in seeds], "{:.2f}×"),
        ["verdict", *(seed.verdict for seed in seeds), *[NONE] * 4],
    ]
    heads = ["", *(f"seed {seed.seed}" for seed in seeds), "mean", "std", "paper", "difference"]
    return TextTable(f"Table 1, {network.title}: before and after pruning", heads, rows)


def _layer_table(found: NetworkFound, network: printed.Network) -> TextTable:
    heads = ["layer", "weights", "paper", "FLOPs", "paper"]
    for head in ("Act%", "Weights%", "FLOP%"):
        heads += [head, "paper", "diff"]
    rows = []
    for row in found.layers:
        cells = [row.name]
        for number in (row.weights, row.flops):
            cells += [short(number.ours), short(number.paper)]
        for value in (row.activation_density, row.density, row.flops_density):
            spread = "" if value.std is None else f" ± {100 * value.std:.1f}"
            cells += [f"{percent(value.mean)}{spread}", percent(value.paper, 0), signed(value.difference)]
        rows.append(cells)
    return TextTable(f"Table {network.table}, {network.title}: what is left of each layer", heads, rows)


def conclusion(found: NetworkFound) -> str:
    """Whether the paper's row was reached, in a sentence."""
    limits, table, passed = found.limits, found.table1, found.passed
    words = "not reached"
    if passed.both:
        words = "reached"
    elif passed.compression:
        words = "compression reached, test error not"
    elif passed.test_error:
        words = "test error reached, compression not"
    return (
        f"The paper's row (at least {limits.compression:g}× at no more than {percent(limits.test_error, 2)} test "
        f"error): {words}. Mean of {len(found.seeds)} seed(s): {table.compression.mean:.2f}× at "
        f"{percent(table.test_error_pruned.mean, 2)}; {found.seeds_passed} of {len(found.seeds)} reach it "
        "by themselves."
    )


def notes(found: NetworkFound) -> list[str]:
    """What a reader must know about the numbers."""
    measured = ", ".join(f"{name.removesuffix('.weight')} {where}" for name, where in found.act_measured.items())
    return [
        f"Act% is the share of non-zero outputs, measured on val images: {measured}. The total weights layers by their "
        "number of outputs. FLOP% = Weights% × the Act% of what the layer reads.",
        f"Test was looked at {found.test_looks} time(s), once a seed; every choice was made on val.",
        f"All seeds together took {found.seconds:.0f} s.",
        "The dense control is the dense network trained on as long as the pruned one; the paper has none. std is the "
        "sample standard deviation over seeds; differences of percentages are in points.",
    ]


def markdown(found: NetworkFound, figures: Sequence[tuple[int, str, str]], command: str) -> str:
    """reproduce.md: the conclusion, the tables, and the figures as (number, file name, what ours shows)."""
    parts = [
        f"# {found.network} beside the paper",
        conclusion(found),
        *(table.markdown() for table in tables(found)),
        "\n".join(f"- {note}" for note in notes(found)),
        *(figure(number, file, text) for number, file, text in figures),
        "## Runs",
        "\n".join(f"- seed {seed.seed}: {seed.verdict}, [report]({seed.run}/report.html)" for seed in found.seeds),
        f"Made by `{command}`, which goes on where it was stopped and repeats nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def figure(number: int, file: str, text: str) -> str:
    """A section with one figure: what the paper's shows, then ours."""
    return f"## Figure {number}\n\nThe paper's: {printed.FIGURES[number]}\n\n![Figure {number}]({file})\n\nOurs: {text}"
