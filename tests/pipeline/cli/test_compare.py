"""`secateur compare`: finished runs side by side, as a table, as JSON, as a figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_files import begin, config, put, result, taken

from pipeline.base.errors import UserError
from pipeline.cli import compare


def finished(tmp_path: Path, name: str, **changes: Any) -> str:
    made = config(tmp_path, name)
    root = begin(made)
    put(root / "result.json", taken({**result(made), **changes}))
    return str(root)


def test_runs_stand_side_by_side_the_smallest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = finished(tmp_path, "one")
    kept = taken(result(config(tmp_path))).weights_kept // 2
    two = finished(tmp_path, "two", weights_kept=kept, verdict="undecided")
    figure = tmp_path / "both.svg"
    compare.show([one, two], str(figure), as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if "lenet_300_100" in line]
    assert [line.split()[1] for line in lines] == ["two", "one"]
    assert "undecided" in lines[0]
    assert figure.read_text().startswith("<svg")
    compare.show([one, two], None, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["one", "two"]
    found = taken(result(config(tmp_path)))
    assert rows[0]["error"] == pytest.approx(1 - found.test.pruned.top1)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = finished(tmp_path, "one")
    with pytest.raises(UserError, match="not finished"):
        compare.show([one, str(begin(config(tmp_path, "two")))], None, as_json=False)
    with pytest.raises(UserError, match="SVG or PNG"):
        compare.show([one], "x.pdf", as_json=False)
    other = taken(result(config(tmp_path))).model_copy(update={"weights_total": 5})
    assert any("different sizes" in note for note in compare.notes([compare.load(one), other]))
