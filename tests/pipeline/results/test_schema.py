"""result.json's contract: a whole result is taken, and what breaks it is named by its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_files import config, result, scores

from pipeline.results.schema import validate

Change = Callable[[dict[str, Any]], Any]


def test_takes_a_whole_result_and_one_with_missing_parts(tmp_path: Path) -> None:
    whole = result(config(tmp_path))
    validate(whole)
    whole["test"]["dense_control"] = None
    whole["bytes"] |= {"packed": None, "packed_index": None, "dense_gzip": None}
    whole["layers"][0] |= {"threshold": None, "activation_density": None, "flops": None}
    whole["seconds"]["scan"] = None
    whole["flops_density"] = None
    validate(whole)


def test_takes_the_parts_that_some_runs_have(tmp_path: Path) -> None:
    whole = result(
        config(tmp_path),
        mlflow={"tracking_uri": "sqlite:///x.db", "run_id": "ab"},
        latency_ms={"device": "cpu", "batch": 1, "dense": 1.0, "pruned": 1.1, "compact": None, "verdict": None},
        rounds=[
            {
                "round": 1,
                "attempt": 1,
                "planned_density": 0.5,
                "density": 0.5,
                "accepted": True,
                "val_top1": 0.98,
                "seconds": 3.2,
            }
        ],
    )
    whole["test"]["pruned"] = scores(0.9838, top1_present=0.99)
    whole["val"]["dense"]["top1_present"] = None
    validate(whole)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda r: r.update(verdict="fine"), "verdict"),
        (lambda r: r.update(extra=1), "(top)"),
        (lambda r: r.pop("seed"), "(top)"),
        (lambda r: r["layers"][1].update(density=1.2), "layers/1/density"),
        (lambda r: r["test"]["pruned"].update(top1=98.4), "test/pruned/top1"),
        (lambda r: r["test"]["mcnemar"].update(drop_ci95=[0.0]), "test/mcnemar/drop_ci95"),
        (lambda r: r["test"]["mcnemar"].update(drop_ci95=[0.0, 0.1, 0.2]), "test/mcnemar/drop_ci95"),
        (lambda r: r.update(weights_kept=1.5), "weights_kept"),
        (lambda r: r["bytes"].update(zip=1), "bytes"),
        (lambda r: r.update(compression=0.5), "compression"),
        (lambda r: r["test"].update(dense=None), "test/dense"),
    ],
)
def test_names_the_place_that_breaks_it(tmp_path: Path, change: Change, place: str) -> None:
    broken = result(config(tmp_path))
    change(broken)
    with pytest.raises(ValueError, match=r"result\.json breaks its contract") as caught:
        validate(broken)
    assert f" {place}: " in str(caught.value)
