"""What a cluster is asked for, checked before anything waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import connect, submit
from pipeline.config import Config
from pipeline.errors import UserError


def test_the_largest_stage_decides_what_is_needed(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"cluster.workers": 3, "cluster.cpus_per_worker": 2, "cluster.gpus_per_trial": 0.25})
    assert connect.demand(config) == {"CPU": 6, "GPU": 0.25}


def test_a_request_that_cannot_be_met_names_both_sides(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"cluster.workers": 4, "cluster.gpus_per_worker": 1})
    connect.check_resources({"CPU": 8, "GPU": 4}, config)
    with pytest.raises(UserError, match=r"cluster\.workers=4 with 1 GPU each.*needs 4 GPU.*the cluster has 2"):
        connect.check_resources({"CPU": 8, "GPU": 2}, config)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"runs_dir": "runs"}, "runs_dir=runs"),
        ({"data.source": "idx", "data.root": "mnist"}, "data.root=mnist"),
        ({"model.checkpoint": "a.pth"}, "model.checkpoint=a.pth"),
        ({"tracking.enabled": True, "tracking.uri": "sqlite:///x.db"}, "tracking.uri=sqlite:///x.db"),
    ],
)
def test_state_that_the_next_job_would_not_see_is_refused(
    tiny: Callable[..., Config], changes: dict[str, object], setting: str
) -> None:
    connect.require_shared_paths(tiny(), "reason")
    with pytest.raises(UserError, match=f"{setting} is relative, but reason"):
        connect.require_shared_paths(tiny(**changes), "reason")


def test_a_job_runs_the_documented_command() -> None:
    command = submit.entrypoint(Path("configs/demo.yaml"), ["runs_dir=/a b", "seed=1"])
    assert command == "python -m cluster run configs/demo.yaml 'runs_dir=/a b' seed=1"
