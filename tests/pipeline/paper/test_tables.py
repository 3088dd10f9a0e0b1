"""Tables and curves beside the paper's, from numbers worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from run_files import round_metrics

from pipeline.paper import curves, figures, printed, seeds, tables
from pipeline.paper.curves import Curve, CurvePoint, Measured
from pipeline.paper.seeds import Against, Beside, SeedRun
from pipeline.results.tables import TextTable, signed
from pipeline.run.records import BeforeRetraining, RoundMetrics
from pipeline.run.result import LayerResult, OnTest, OnVal, Paired, Result, Scores, StageSeconds, StoredBytes

LENET = printed.NETWORKS["lenet-300-100"]


def run(seed: int, dense: float, control: float | None, pruned: float, kept: int, active: float) -> SeedRun:
    """A run of a network with two layers of 100 weights, the second of which the paper does not have."""
    fc1 = layer("fc1.weight", 200, active, 0.1 * seed, 0.1 * seed)
    found = Result(
        name=f"seed-{seed}",
        network="lenet_300_100",
        seed=seed,
        verdict="no loss",
        test_looks=seed,
        weights_total=200,
        weights_kept=kept,
        compression=200 / kept,
        density=kept / 200,
        flops_density=0.3,
        val=OnVal(dense=scores(0.99), pruned=scores(0.98)),
        test=OnTest(
            samples=10_000,
            dense=scores(dense),
            dense_control=None if control is None else scores(control),
            pruned=scores(pruned),
            mcnemar=Paired(only_dense_right=0, only_pruned_right=0, p_value=1.0, drop_ci95=(0.0, 0.0)),
        ),
        layers=(fc1, layer("extra.weight", 400, 1.0, 0.5, 0.25)),
        bytes=StoredBytes(dense_fp32=800, packed=None, packed_index=None, dense_gzip=None),
        latency_ms=None,
        rounds=(),
        seconds=StageSeconds(shards=1.0, dense=2.0, scan=None, rounds=None, final=None),
        mlflow=None,
        versions={},
    )
    outputs, measured = {"fc1.weight": 30, "extra.weight": 10}, {"fc1.weight": "after relu1"}
    return SeedRun(seed, f"seed-{seed}", found, outputs, measured)


def scores(top1: float) -> Scores:
    return Scores(top1=top1, top5=None, loss=0.1)


def layer(name: str, flops: int, active: float, density: float, flops_density: float) -> LayerResult:
    return LayerResult(
        name=name,
        kind="fc",
        weights=100,
        kept=round(100 * density),
        density=density,
        flops=flops,
        activation_density=active,
        flops_density=flops_density,
        threshold=None,
        packed_bits_per_kept=None,
    )


def test_two_seeds_become_mean_spread_and_difference() -> None:
    runs = [run(1, 0.98, 0.985, 0.986, 10, 0.4), run(3, 0.99, None, 0.982, 20, 0.6)]
    found = seeds.aggregate("lenet-300-100", LENET, runs)
    table = found.table1
    assert table.test_error_pruned.mean == pytest.approx(0.016)
    assert table.test_error_pruned.std == pytest.approx(0.002 * 2**0.5)  # 0.014 and 0.018
    assert table.test_error_pruned.paper == pytest.approx(0.0159)
    assert table.test_error_pruned.difference == pytest.approx(0.0001)
    assert table.test_error_dense.mean == pytest.approx(0.015)
    assert table.test_error_dense_control == Against(mean=None, std=None, paper=None, difference=None)
    assert table.drop.mean == pytest.approx(0.001)  # -0.006 and 0.008
    assert table.compression.mean == pytest.approx(15)
    assert found.seeds[1].test_error.dense_control is None
    assert (found.test_looks, found.seconds) == (4, 6.0)
    # Each seed misses one half of the row; their mean reaches both.
    assert (found.passed.both, found.seeds_passed) == (True, 1)


def test_layers_stand_beside_the_papers_and_the_total_counts_outputs() -> None:
    runs = [run(1, 0.98, 0.98, 0.98, 10, 0.4), run(3, 0.98, 0.98, 0.98, 10, 0.6)]
    fc1, extra, total = seeds.layer_rows(LENET, runs)
    assert fc1.name == "fc1"
    assert fc1.weights == Beside(ours=100, paper=235_000)
    assert fc1.density.mean == pytest.approx(0.2)
    assert fc1.density.difference == pytest.approx(0.12)  # the paper's 8%
    assert extra.weights == Beside(ours=100, paper=None)
    assert extra.density.difference is None
    assert total.flops == Beside(ours=600, paper=532_000)
    # (30 * 0.4 + 10) / 40 and (30 * 0.6 + 10) / 40
    assert total.activation_density.mean == pytest.approx((0.55 + 0.7) / 2)
    assert total.density.to_json() == pytest.approx({"mean": 0.05, "std": 0.0, "paper": 0.08, "difference": -0.03})


@pytest.mark.parametrize(
    ("compression", "error", "reached"),
    [(12, 1 - 0.9836, "both"), (12, 0.0165, "compression"), (11.99, 0.0164, "test_error"), (11, 0.02, None)],
)
def test_a_row_is_reached_at_its_limits_and_not_beyond(compression: float, error: float, reached: str | None) -> None:
    found = seeds.within(LENET, compression, error)
    expected = {"both": ["compression", "test_error", "both"]}.get(str(reached), [reached] if reached else [])
    assert [name for name, value in found.to_json().items() if value] == expected


def test_one_seed_has_no_spread_and_the_page_holds_what_was_measured() -> None:
    found = seeds.aggregate("lenet-300-100", LENET, [run(1, 0.98, 0.985, 0.98, 10, 0.4)])
    assert found.table1.compression.std is None
    page = tables.markdown(found, [(4, "figure4.png", "bands.")], "secateur reproduce")
    assert "| test error, pruned | 2.00% | 2.00% | – | 1.59% | +0.41 |" in page
    assert "| fc1 | 100 | 235K | 200 | 470K | 40.0% | 38% | +2.0 | 10.0% | 8% | +2.0 | 10.0% | 8% | +2.0 |" in page
    assert "![Figure 4](figure4.png)" in page
    assert "compression reached, test error not" in page
    assert "[report](seed-1/report.html)" in page


def test_the_papers_totals_are_those_of_its_layers() -> None:
    """A number typed wrong would not add up; the paper itself rounds to a unit of its last digit."""
    for network in printed.NETWORKS.values():
        assert sum(layer.weights for layer in network.layers) == pytest.approx(network.total.weights, abs=1000)
        assert sum(layer.flops for layer in network.layers) == pytest.approx(network.total.flops, abs=1000)
        kept = sum(layer.weights * layer.weights_left for layer in network.layers) / network.total.weights
        assert kept == pytest.approx(network.total.weights_left, abs=1)


def metrics(density: float, before: float, after: float) -> RoundMetrics:
    made = round_metrics(1, density)
    return replace(
        made,
        density=density,
        val_before_retrain=BeforeRetraining(before, 0.4),
        val=replace(made.val, top1=after),
    )


def test_the_curves_are_losses_against_the_dense_network_with_l2_and_their_order_is_said() -> None:
    measured = {
        "l2": Measured(
            dense_top1=0.98,
            samples=10_000,
            one_shot=(metrics(0.5, 0.97, 0.98), metrics(0.1, 0.5, 0.96)),
            iterative=(metrics(0.5, 0.97, 0.98), metrics(0.1, 0.7, 0.979)),
            seconds=1.0,
        ),
        "l1": Measured(
            dense_top1=0.97,
            samples=10_000,
            one_shot=(metrics(0.5, 0.97, 0.97), metrics(0.1, 0.9, 0.965)),
            iterative=(),
            seconds=2.0,
        ),
    }
    part = curves.assemble("lenet-300-100", 0, measured)
    assert part.seconds == 3.0
    by_name = {curve.name: curve.points for curve in part.curves}
    assert [point.loss for point in by_name["L1, not retrained"]] == pytest.approx([0.01, 0.08])
    assert [point.away for point in by_name["L2, retrained"]] == pytest.approx([0.5, 0.9])
    assert len(by_name) == 5
    # Standard errors: 0.98 against 0.97 differs by 4.5 of them, 0.96 against 0.965 by 1.9, 0.979 against 0.965 by 6.
    assert [row.verdict for row in part.order] == [curves.AS_IN_PAPER] * 4
    assert "clearly so at 1 of 2 points, clearly the other way at 0" in part.order[0].detail
    assert "of 1 points" in part.order[2].detail  # only 90% away and more
    assert curves.table(part).rows[1] == ["90.0%", "-2.00", "-1.50", "-8.00", "-48.00", "-0.10"]
    assert len(curves.sentences(part)) == 5


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([0.9, 0.9], [0.8, 0.9], curves.AS_IN_PAPER),
        ([0.8, 0.9], [0.9, 0.9], curves.REVERSED),
        ([0.9, 0.8], [0.8, 0.9], curves.MIXED),
        ([0.9, 0.8], [0.89, 0.81], curves.UNCLEAR),  # of 400 images, less than two standard errors
    ],
)
def test_an_order_is_claimed_only_where_the_gap_is_clear(better: list[float], worse: list[float], verdict: str) -> None:
    def curve(name: str, values: list[float]) -> Curve:
        away = zip((0.5, 0.95), values, strict=True)
        return Curve(name, tuple(CurvePoint(1 - share, share, top1, 0.98 - top1) for share, top1 in away))

    drawn = {"L1, not retrained": better, "L2, not retrained": worse}
    found = curves.order([curve(name, drawn.get(name, [0.5, 0.5])) for name in curves.CURVES], 400)
    assert found[0].verdict == verdict
    assert found[1].verdict == curves.UNCLEAR


def test_figure_4_counts_where_the_kept_weights_lie() -> None:
    kept = np.zeros((3, 16), dtype=bool)  # a 4 x 4 image: its middle are pixels 5, 6, 9 and 10
    kept[:, 5] = kept[0, 10] = kept[1, 0] = True
    found = figures.centre(kept, 4)
    assert found.middle_share == pytest.approx(4 / 5)
    assert found.middle_area == 0.25
    assert found.empty_pixels == 13
    assert found.rows == [1, 3, 1, 0]


def test_a_table_is_markdown_and_a_difference_of_nothing_has_no_minus() -> None:
    assert TextTable("T", ["a", "b"], [["x", "1"]]).markdown() == "**T**\n\n| a | b |\n| --- | ---: |\n| x | 1 |"
    assert [signed(value) for value in (0.0123, -0.0123, -0.00001, None)] == ["+1.2", "-1.2", "+0.0", "–"]
