"""What is used of Ray beyond its public interface, name by name: a new Ray that lacks one is seen here first."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.patience import UP

CALLBACK = "ray.train.v2._internal.execution.callback"
STATES = "ray.train.v2._internal.execution.controller.state"
PACKAGING = "ray._private.runtime_env.packaging"
TRAINER = "ray.train.v2.api.data_parallel_trainer"
DRAIN = ["node_id", "reason", "reason_message", "deadline_timestamp_ms"]
# Module, name in it, arguments that it must take (None: it is not called), and who uses it.
NAMES: list[tuple[str, str, Sequence[str] | None, str]] = [
    (CALLBACK, "ControllerCallback", None, "cluster/patience.py"),
    (
        CALLBACK,
        "ControllerCallback.after_controller_state_update",
        ["self", "previous_state", "current_state"],
        "cluster/patience.py",
    ),
    *((STATES, state, None, "cluster/patience.py") for state in UP),
    ("ray.train._internal.utils", "get_address_and_port", [], "cluster/group.py"),
    ("ray.train.v2._internal.callbacks.datasets", "DatasetsCallback", None, "cluster/group.py"),
    (TRAINER, "DataParallelTrainer._create_default_callbacks", ["self"], "cluster/group.py"),
    (PACKAGING, "GCS_STORAGE_MAX_SIZE", None, "cluster/job_env.py"),
    (PACKAGING, "_get_excludes", ["path", "excludes"], "cluster/job_env.py"),
    (PACKAGING, "_dir_travel", ["path", "excludes", "handler", "include_gitignore", "logger"], "cluster/job_env.py"),
    ("ray._private.worker", "print_to_stdstream", ["data", "ignore_prefix"], "cluster/connect.py"),
    ("ray._private.worker", "listen_error_messages", None, "cluster/connect.py"),  # which calls it
    ("ray.train.v2._internal.exceptions", "WorkerHealthCheckFailedError", None, "cluster/losses.py"),
    ("ray.train.v2._internal.exceptions", "WorkerHealthCheckTimeoutError", None, "cluster/losses.py"),
    ("ray.runtime_env", "RuntimeEnv.known_fields", None, "cluster/job_env.py"),
    ("ray.autoscaler._private.util", "prepare_config", ["config"], "tests/infra"),
    ("ray.autoscaler._private.util", "validate_config", ["config"], "tests/infra"),
    (
        "ray.autoscaler._private.aws.node_provider",
        "AWSNodeProvider.bootstrap_config",
        ["cluster_config"],
        "tests/infra/test_terraform.py",
    ),
    ("ray._raylet", "GcsClient", None, "tests/faults/ray_nodes.py"),
    ("ray._raylet", "InnerGcsClient.drain_node", DRAIN, "tests/faults/ray_nodes.py"),  # which GcsClient hands calls to
    ("ray.core.generated.autoscaler_pb2", "DrainNodeReason.Value", None, "tests/faults/ray_nodes.py"),
]
# Variables of the environment that Ray reads, the module of Ray that names each, and who sets or reads it.
VARIABLES = [
    ("RAY_CHDIR_TO_TRIAL_DIR", "ray.train.constants", "cluster/connect.py"),
    ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "ray.train.v2._internal.constants", "cluster/connect.py"),
    ("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "ray.train.v2._internal.constants", "cluster/connect.py"),
    ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "ray.train.v2._internal.constants", "cluster/connect.py"),
    ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "ray.train.v2._internal.constants", "cluster/connect.py, cluster/train.py"),
    ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "ray._private.accelerators.accelerator", "cluster/connect.py"),
    ("RAY_DEDUP_LOGS", "ray._private.ray_constants", "cluster/connect.py"),
    ("RAY_AIR_NEW_OUTPUT", "ray.tune.experimental.output", "cluster/connect.py"),
    ("TUNE_DISABLE_SIGINT_HANDLER", "ray.tune.tune", "cluster/connect.py"),
    ("RAY_JOB_CONFIG_JSON_ENV_VAR", "ray._private.runtime_env.constants", "cluster/connect.py"),
    ("RAY_JOB_STOP_WAIT_TIME_S", "ray.dashboard.modules.job.job_supervisor", "cluster/job_env.py"),
    ("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "ray._private.ray_constants", "cluster/job_env.py"),
]


@pytest.mark.parametrize(("module", "name", "taken", "user"), NAMES, ids=[name for _, name, _, _ in NAMES])
def test_a_private_name_of_ray_is_still_there(module: str, name: str, taken: Sequence[str] | None, user: str) -> None:
    found = look_up(module, name)
    assert found is not None, f"Ray {ray.__version__} has no {module}.{name}, which {user} uses: {user} must change"
    if taken is not None:
        takes = list(inspect.signature(found).parameters)
        assert not set(taken) - set(takes), (
            f"{module}.{name} of Ray {ray.__version__} takes {takes}, but {user} gives it {taken}: {user} must change"
        )


@pytest.mark.parametrize(("variable", "module", "user"), VARIABLES, ids=[name for name, _, _ in VARIABLES])
def test_a_variable_is_still_read_by_ray(variable: str, module: str, user: str) -> None:
    spec = find_spec(module)
    text = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin is not None else ""
    assert f'"{variable}"' in text, (
        f"{module} of Ray {ray.__version__} no longer names {variable}, which {user} relies on: {user} must change"
    )


def look_up(module: str, name: str) -> Any:
    """What a dotted name in a module stands for; None where any part of it is gone."""
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
