"""Ray's words for lost processes as one sentence, and how losses are counted; the texts are Ray's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster import connect, losses
from cluster.losses import Tries, Written
from cluster.submit import require_own_names
from cluster.sweep import require_loss
from cluster.train import may_pass, would_repeat
from pipeline.base.errors import Away, RunStopped, UserError
from pipeline.run.state import Run

DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tactor_id: 9\n"
    "\tpid: 21613\n\tnamespace: efb2e0aa\n\tip: 10.0.0.7\nThe actor is dead because its worker process has died. "
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. "
    "Some common causes include: (1) the process was killed by the OOM killer due to high memory usage"
)
MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: f727913b) "
    "was 15.21GB used / 16.00GB limit (0.950625)\nOOM kill reason: Memory usage 1B exceeded threshold of 1B "
    "(95.0% of 1B limit)\n"
    "Object store memory usage: [- objects spillable: 0\nRay killed 1 worker(s) based on the killing policy\n"
    "Considered workers: [\nSelected to kill: (Task: job ID=01000000, lease ID=0000, task name=_Events.__init__, "
    "required resources={}, pid=21613, actual memory used=9.75GB, worker ID=73c4)\n]\nTop 10 memory users: PID\n"
    "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/"
)


def died(text: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = text
    return error


def test_a_process_that_died_is_named_with_its_node() -> None:
    said = losses.told(WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", died(DIED)))
    assert said.startswith("its process with process id 21613 on node 10.0.0.7 died (killed, ")


@pytest.mark.parametrize("error", [died(MEMORY), OutOfMemoryError(MEMORY)])
def test_what_the_memory_monitor_killed_is_named_with_process_and_amounts(error: Exception) -> None:
    assert losses.is_memory(error)
    assert losses.told(error) == (
        "Ray's memory monitor killed its process 21613, which used 9.75 GB, on node 10.0.0.7, where 15.21 of 16.00 GB "
        "were in use"
    )


def test_ranks_that_only_lost_touch_with_the_lost_one_are_left_out() -> None:
    gloo = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:1")
    said = losses.of_group({0: gloo, 1: WorkerHealthCheckFailedError("", died(DIED))})
    assert said.startswith("rank 1 was lost: its process with process id 21613")
    assert "rank 0" not in said
    assert "rank 0" in losses.of_group({0: gloo})


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (died(DIED), True),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TypeError("two outputs"), False),
        (MemoryError(), False),
    ],
)
def test_only_a_loss_is_tried_again(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes
    if not passes:
        assert "not tried again" in would_repeat("dense", error)


def test_lack_of_memory_in_a_trial_is_not_tried_again() -> None:
    raised = RayTaskError("train", "Traceback ...", torch.OutOfMemoryError("CUDA out of memory")).as_instanceof_cause()
    with pytest.raises(UserError, match=r"scan: fc1.weight: not enough memory: lower data.eval_batch.*not tried again"):
        require_loss(raised, "scan: fc1.weight")
    own = RayTaskError("train", "Traceback ...", TypeError("two outputs")).as_instanceof_cause()
    with pytest.raises(RunStopped, match=r"TypeError: two outputs; it was not tried again"):
        require_loss(own, "scan: fc1.weight")
    require_loss(died(DIED), "scan: fc1.weight")  # a loss


def test_losses_count_only_while_no_newer_checkpoint_came(tmp_path: Path) -> None:
    run, steps = Run(str(tmp_path), 0), tmp_path / "dense/steps"

    def save(step: int) -> None:
        (steps / f"{step:08d}").mkdir(parents=True)
        (steps / f"{step:08d}/weights.safetensors").touch()
        (steps / f"{step:08d}/manifest.json").touch()

    tries, written = Tries(1, "checkpoint"), Written(run, "dense")
    for step in range(4):  # four losses, with progress before each
        save(step)
        assert tries.again(written.more())
    (steps / "00000000/manifest.json").unlink()  # old checkpoints go: that is no progress
    assert not tries.again(written.more())
    assert tries.said() == "it was tried again once without a newer checkpoint (cluster.max_failures=1)"
    torn = steps / "00000009"
    torn.mkdir()
    (torn / "weights.safetensors").touch()  # and a torn one is none
    assert not tries.again(written.more())
    assert not Tries(0, "checkpoint").again(progressed=True)


class Slow:
    """Stands in for Ray, whose processes take too long to come up `times` times."""

    def __init__(self, times: int) -> None:
        self.times, self.tries = times, 0

    def init(self, **_: Any) -> None:
        self.tries += 1
        if self.tries <= self.times:
            raise Exception("The current node timed out during startup. This could happen because some of the raylet")

    def shutdown(self) -> None:
        pass


def test_a_slow_start_of_ray_is_tried_again_and_the_message_says_how_often() -> None:
    twice = Slow(2)
    with pytest.warns(UserWarning, match="too slow to come up; try [23] of 3"):
        connect.start(twice, {"address": "local"})
    assert twice.tries == 3
    with (
        pytest.warns(UserWarning, match="try"),
        pytest.raises(Away, match="Ray did not come up on this machine in 3 tries"),
    ):
        connect.start(Slow(3), {"address": "local"})


@pytest.mark.parametrize("name", ["pipeline", "cluster"])
def test_a_folder_that_would_hide_ours_is_not_sent(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    require_own_names(tmp_path)  # a folder without code hides nothing
    (tmp_path / name / "__init__.py").touch()
    with pytest.raises(UserError, match=f"hides secateur's own package '{name}'"):
        require_own_names(tmp_path)
    require_own_names(Path(__file__).resolve().parents[2])  # a checkout of ours
