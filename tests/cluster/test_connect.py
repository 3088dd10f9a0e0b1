"""What a cluster is asked for, checked before anything waits for it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import connect, submit
from pipeline.base.errors import UserError
from pipeline.cli.sigterm import as_ctrl_c
from pipeline.settings.config import Config


def test_the_largest_stage_decides_what_is_needed(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"cluster.workers": 3, "cluster.cpus_per_worker": 2, "cluster.gpus_per_trial": 0.25})
    assert connect.demand(config) == {"CPU": 6, "GPU": 0.25}


def test_a_request_that_cannot_be_met_names_both_sides(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"cluster.workers": 4, "cluster.gpus_per_worker": 1})
    assert connect.shortage([{"CPU": 4, "GPU": 2}, {"CPU": 4, "GPU": 2}], config) is None
    assert connect.shortage([{"CPU": 8, "GPU": 2}], config) == (
        "cluster.workers=4 with 1 GPU each needs 4 GPU, but the cluster has 2 GPU: lower cluster.workers or "
        "cluster.gpus_per_worker, or add nodes"
    )


def test_of_a_range_of_workers_the_fewest_must_fit(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"cluster.workers": [2, 8]})
    assert connect.demand(config)["CPU"] == 8  # of one's own machine, which may give more than it has
    assert connect.shortage([{"CPU": 1}, {"CPU": 1}], config) is None
    assert "cluster.workers=[2, 8] with 1 CPU each needs 2 CPU, but the cluster has 1 CPU:" in str(
        connect.shortage([{"CPU": 1}], config)
    )


def test_a_worker_must_fit_on_one_node(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"cluster.workers": 1, "cluster.cpus_per_worker": 4})
    assert connect.shortage([{"CPU": 2}, {"CPU": 2}], config) == (
        "cluster.workers=1 with 4 CPU each needs 4 CPU, but the cluster has 4 CPU on nodes of 2 CPU, with room for 0, "
        "since a worker must fit on one node: lower cluster.workers or cluster.cpus_per_worker, or add nodes"
    )
    both = tiny(**{"cluster.workers": 2, "cluster.gpus_per_worker": 1})
    assert "on nodes of 0 CPU and 1 GPU; 8 CPU and 1 GPU, with room for 1," in str(
        connect.shortage([{"CPU": 8, "GPU": 1}, {"GPU": 1}], both)
    )


def test_a_trial_may_take_a_share_of_a_gpu(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"cluster.gpus_per_trial": 0.25})
    assert connect.shortage([{"CPU": 1, "GPU": 1}], config) is None
    assert connect.shortage([{"CPU": 1}], config) == (
        "a scan trial with 0.25 GPU each needs 0.25 GPU, but the cluster has 0 GPU: lower cluster.gpus_per_trial, or "
        "add nodes"
    )


@pytest.mark.parametrize(("share", "count"), [(0.25, 8), (0.3, 6), (0.7, 2), (1, 2), (2, 1)])
def test_shares_lie_on_one_gpu(share: float, count: int) -> None:
    assert connect.room([{"CPU": 100, "GPU": 2}], {"CPU": 1, "GPU": share}) == count


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


def test_while_ray_comes_or_goes_sigterm_waits_and_stays_ours() -> None:
    before, reached = signal.getsignal(signal.SIGTERM), []

    def come() -> None:
        with connect.sigterm_later():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as ray.init sets its own
            signal.raise_signal(signal.SIGTERM)
            reached.append(1)

    with as_ctrl_c():
        ours = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            come()
        assert signal.getsignal(signal.SIGTERM) == ours
    assert reached == [1]
    assert signal.getsignal(signal.SIGTERM) == before
