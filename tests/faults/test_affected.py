"""Which fault tests a change asks for."""

from __future__ import annotations

from faults.affected import COVERS, HERE, ROOT, affected


def test_every_file_of_fault_tests_covers_something_that_is_there() -> None:
    files = {path.stem for path in HERE.glob("test_*.py") if "mark.faults" in path.read_text()}
    assert set(COVERS) == files - {"test_affected"}
    for patterns in COVERS.values():
        for pattern in patterns:
            assert list(ROOT.glob(pattern)), pattern


def test_a_change_names_the_tests_that_cover_it() -> None:
    assert affected(["README.md", "docs/x.md"]) == []
    assert affected(["cluster/submit.py"]) == ["tests/faults/test_jobs.py"]
    assert affected(["pipeline/run/lease.py", "README.md"]) == [
        f"tests/faults/test_{name}.py" for name in ("fence", "processes", "runs_on_s3", "twenty_runs", "two_mounts")
    ]


def test_a_change_to_a_part_of_the_tests_names_those_that_use_it() -> None:
    assert affected(["tests/faults/gated.py"]) == [
        f"tests/faults/test_{name}.py" for name in ("elastic", "mlflow_away", "processes", "two_mounts")
    ]
