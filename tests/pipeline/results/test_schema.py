"""result.json's contract: a whole result is taken, and what breaks it is named by its place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from run_files import config, result, scores, taken
from support import ROOT

from pipeline.base.errors import UserError
from pipeline.run.result import schema

Change = Callable[[dict[str, Any]], Any]


def test_takes_a_whole_result_and_one_with_missing_parts(tmp_path: Path) -> None:
    whole = result(config(tmp_path))
    taken(whole)
    whole["test"]["dense_control"] = None
    whole["bytes"] |= {"packed": None, "packed_index": None, "dense_gzip": None}
    whole["layers"][0] |= {"threshold": None, "activation_density": None, "flops": None}
    whole["seconds"]["scan"] = None
    whole["flops_density"] = None
    taken(whole)


def full(runs_dir: Path) -> dict[str, Any]:
    """A result with every part that some runs have."""
    return result(
        config(runs_dir),
        mlflow={"tracking_uri": "sqlite:///x.db", "run_id": "ab"},
        lineage={
            "run": "a",
            "path": "runs/a",
            "uid": "01",
            "round": 1,
            "generation": 1,
            "weights": 10,
            "kept": 5,
            "density": 0.5,
            "compression": 2.0,
            "mlflow_run_id": None,
            "ancestors": [{"run": "b", "uid": "02", "round": 0}],
        },
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


def test_takes_the_parts_that_some_runs_have(tmp_path: Path) -> None:
    whole = full(tmp_path)
    whole["test"]["pruned"] = scores(0.9838, top1_present=0.99)
    whole["val"]["dense"]["top1_present"] = None
    taken(whole)
    del whole["val"]["dense"]["top1_present"]
    del whole["lineage"]  # which older runs lack
    taken(whole)


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
    with pytest.raises(UserError, match=r"result\.json' breaks its contract") as caught:
        taken(broken)
    assert f" {place}: " in str(caught.value)


def test_the_schema_for_scripts_is_up_to_date() -> None:
    file = ROOT / "pipeline/results/result.schema.json"
    assert json.loads(file.read_text()) == json.loads(json.dumps(schema())), "run `make schema`, which writes it"


Place = tuple[str | int, ...]
WRONG = (None, True, "", "text", "1", -2, -0.5, 0.5, 1.5, [], [0.1], [0.1, 0.2], [0.1, 0.2, 0.3], {}, {"a": 1})


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """The place of every value within a document."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*at, key)
            yield from places(inner, (*at, key))


def mutants(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The document with one value replaced, left out, or with one more beside it."""
    for *parents, last in places(document):
        for wrong in WRONG:
            changed = copy.deepcopy(document)
            inner(changed, parents)[last] = wrong
            yield changed
        less, more = copy.deepcopy(document), copy.deepcopy(document)
        del inner(less, parents)[last]
        yield less
        around = inner(more, parents)
        if isinstance(around, dict):
            around["more"] = 1
        else:
            around.append(1)
        yield more


def inner(document: Any, keys: list[str | int]) -> Any:
    for key in keys:
        document = document[key]
    return document


def accepted(document: dict[str, Any]) -> bool:
    try:
        taken(document)
    except UserError:
        return False
    return True


def test_the_schema_for_scripts_refuses_what_we_refuse(tmp_path: Path) -> None:
    validator, refused, count = Draft202012Validator(schema()), 0, 0
    for changed in mutants(full(tmp_path)):
        right = accepted(changed)
        assert validator.is_valid(changed) == right, changed
        refused, count = refused + (not right), count + 1
    assert refused > count / 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10.0])
def test_a_number_that_json_does_not_know_and_a_count_with_a_point_are_refused(tmp_path: Path, value: float) -> None:
    broken = {**result(config(tmp_path)), "weights_total": value}
    assert not accepted(broken)
