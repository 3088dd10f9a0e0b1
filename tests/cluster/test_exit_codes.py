"""Exit codes: 2 for a mistake, 75 for what may pass, so that what starts a run knows whether to start it again."""

from __future__ import annotations

import inspect
import os
import sys

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal import exceptions as trains
from support import free_port

from cluster import losses
from cluster import train as training
from cluster.cli import main
from pipeline.base.errors import Agreed, Away, Lost, RunStopped, UserError
from pipeline.cli.messages import MISTAKE, PASSING, one_message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2),
        (RunStopped("x"), 2),
        (Agreed("x"), 2),
        (Away("x"), 75),
        (Lost("x"), 75),
    ],
)
def test_an_error_has_its_code(error: Exception, code: int) -> None:
    def work() -> None:
        with one_message():
            raise error

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == code
    assert (MISTAKE, PASSING) == (2, os.EX_TEMPFAIL)


@pytest.mark.parametrize("error", [Away("x"), UserError("x"), Lost("x"), Agreed("x"), RunStopped("x")])
def test_what_a_worker_met_is_raised_by_the_driver(error: Exception) -> None:
    kind = training.kind_of(error)
    assert isinstance(error, kind)
    assert isinstance(error, Away | Lost) == issubclass(kind, Away | Lost)


def test_a_cluster_that_does_not_answer_may_come_back(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    command = ["submit", "configs/demo.yaml", "--address", address, "runs_dir=/shared/runs", "data.root=/shared/data"]
    monkeypatch.setattr(sys, "argv", ["secateur", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 75, capfd.readouterr()


def user_error(error: Exception) -> Exception:
    return trains.UserExceptionWithTraceback(error, "Traceback ...")


@pytest.mark.parametrize(
    ("failure", "passes"),
    [
        (WorkerGroupError("x", {0: trains.WorkerHealthCheckFailedError("x", NodeDiedError("gone"))}), True),
        (WorkerGroupError("x", {0: NodeDiedError("gone"), 1: NodeDiedError("gone")}), True),
        (WorkerGroupError("x", {0: user_error(ValueError("a bug"))}), False),
        (WorkerGroupError("x", {0: user_error(ValueError("a bug")), 1: NodeDiedError("gone")}), False),
        (WorkerGroupError("x", {0: OutOfMemoryError("too much")}), False),
        (ControllerError(trains.WorkerGroupStartupFailedError("x")), True),
        (ControllerError(ValueError("a bug")), False),
    ],
)
def test_lost_machines_are_told_from_bugs(failure: Exception, passes: bool) -> None:
    assert losses.is_loss(failure) == passes


def test_a_task_that_fails_by_itself_is_no_loss() -> None:
    failed = RayTaskError("answer", "Traceback ...", ValueError("a bug"))
    assert not losses.is_loss(failed)
    assert losses.is_loss(NodeDiedError("gone"))


def test_ray_train_still_has_these_errors() -> None:
    assert {name for name, _ in inspect.getmembers(trains, inspect.isclass)} >= losses.OF_RAY_TRAIN
