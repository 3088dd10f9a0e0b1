"""GitHub's workflow: it calls .ci/run and checks nothing of its own, with no more rights than it needs."""

from __future__ import annotations

import os
import re
import tomllib

import yaml
from support import ROOT

WORKFLOWS = ROOT / ".github/workflows"


def test_it_runs_what_ci_runs_and_nothing_else() -> None:
    assert [path.name for path in WORKFLOWS.iterdir()] == ["ci.yml"]
    flow = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())
    assert set(flow["on"]) == {"push", "pull_request"}
    assert flow["permissions"] == {"contents": "read"}
    (job,) = flow["jobs"].values()
    assert "permissions" not in job
    assert [step["run"] for step in job["steps"] if "run" in step] == ['sudo env "PATH=$PATH" .ci/run']
    assert job["steps"][-1].keys() == {"run"}, "nothing stands between the machine and .ci/run"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_its_actions_are_githubs_own_by_major_version_and_leave_no_token_behind() -> None:
    flow = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())
    steps = {step["uses"]: step["with"] for step in flow["jobs"]["ci"]["steps"] if "uses" in step}
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", name) for name in steps)
    by_name = {name.partition("@")[0]: given for name, given in steps.items()}
    assert by_name["actions/checkout"] == {"fetch-depth": 0, "persist-credentials": False}
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"]
    assert by_name["actions/setup-python"] == {"python-version": oldest}
