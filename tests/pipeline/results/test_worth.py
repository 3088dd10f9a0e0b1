"""A figure that would show a point or two is left out; the tables stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scan_records
from run_files import begin, config, dense, finals, history, put, round_done, round_metrics, whole

from pipeline.results import report, worth
from pipeline.run.records import DenseMetrics, Epoch, Evaluation, WeightHistogram


def trained(epochs: int) -> DenseMetrics:
    return DenseMetrics(Evaluation(0.9, None, 0.1), history(epochs, 0.5, 0.9), 1.0, 1)


def rounds_of(*epochs: int) -> list[DenseMetrics]:
    return [replace(round_metrics(n, 0.5), history=history(each, 0.5, 0.9)) for n, each in enumerate(epochs, 1)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("before", "retrained", "drawn"),
    [(0, [1], False), (0, [1, 1, 1, 1], False), (2, [1], False), (0, [2, 2], True), (4, [], True), (0, [1, 3], True)],
)
def test_a_curve_has_several_epochs(before: int, retrained: list[int], drawn: bool) -> None:
    assert worth.training(trained(before), rounds_of(*retrained)) is drawn  # type: ignore[arg-type]


def test_a_histogram_has_weights_and_some_of_them_are_kept() -> None:
    edges = (-1.0, 0.0, 1.0)
    assert worth.histogram(WeightHistogram("w", edges, (50, 50), (0, 1)))
    assert not worth.histogram(WeightHistogram("w", edges, (50, 49), (20, 20)))
    assert not worth.histogram(WeightHistogram("w", edges, (500, 500), (0, 0)))


def test_a_line_of_the_scan_has_two_ends() -> None:
    levels = [scan_records.level(density, top1=density, loss=1.0) for density in (0.5, 0.1)]
    assert worth.sensitivity(scan_records.scan([scan_records.tensor("w", 10, levels)]))
    assert not worth.sensitivity(scan_records.scan([scan_records.tensor("w", 10, levels[:1])]))


def test_the_report_of_a_small_run_has_its_tables_and_no_empty_figure(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = begin(settings)
    dense(run)
    short: tuple[Epoch, ...] = history(1, 0.9, 0.983)
    put(run / "dense/metrics.json", DenseMetrics(Evaluation(0.983, None, 0.07), short, 12.0, 1))
    levels = [scan_records.level(0.5, quality=0.7, samples=60, top1=0.97, loss=0.1)]
    put(run / "scan/scan.json", scan_records.scan([scan_records.tensor("fc1.weight", 10, levels)], samples=60))
    round_done(run, 1, 0.0724)
    put(run / "rounds/01/metrics.json", replace(round_metrics(1, 0.0724), history=short))
    finals(run, settings)
    text = report.render(run)
    for label in ("Validation accuracy against", "Training loss and", "one tensor pruned at a time"):
        assert label not in text
    for said in ("Each round prunes, then retrains", "Thresholds read off the scan", "Percent of weights kept in each"):
        assert said in text
    full = report.render(whole(config(tmp_path / "full")))
    for label in ("Validation accuracy against", "Training loss and", "one tensor pruned at a time"):
        assert label in full
