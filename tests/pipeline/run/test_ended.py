"""How a run's driver ended is written down, and forgotten when the next one begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.base.errors import UserError
from pipeline.run import ended
from pipeline.run.state import Run


@pytest.mark.parametrize(
    ("error", "how"), [(KeyboardInterrupt(), "killed"), (SystemExit(130), "killed"), (UserError("no room"), "failed")]
)
def test_the_end_is_noted_until_the_next_beginning(tmp_path: Path, error: BaseException, how: str) -> None:
    (tmp_path / "lease.json").write_text('{"fence": 0}')
    run = Run(str(tmp_path), 0)
    with pytest.raises(type(error)), ended.noted(run):
        raise error
    known = json.loads((tmp_path / "ended.json").read_text())
    assert known["how"] == how
    assert type(error).__name__ in known["why"]
    with ended.noted(run):
        assert not run.has("ended.json")
    assert not run.has("ended.json")


def test_a_driver_whose_run_was_taken_over_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text('{"fence": 2}')
    with pytest.raises(UserError, match="mine"), ended.noted(Run(str(tmp_path), 1)):
        raise UserError("mine")
    assert not (tmp_path / "ended.json").exists()
