"""infra/aws/cluster.yaml by Ray's own validator, and what it promises about tokens, spot and the world outside."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from infra_files import INFRA
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster import job_env

TEXT = (INFRA / "aws/cluster.yaml").read_text()
CLUSTER: dict[str, Any] = yaml.safe_load(TEXT)
HEAD = CLUSTER["available_node_types"]["head"]["node_config"]
WORKER = CLUSTER["available_node_types"]["gpu-spot"]["node_config"]


def test_ray_takes_it() -> None:
    prepared = prepare_config(CLUSTER)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"
    assert json.dumps(prepared).count("pip install") == 0, "Ray's defaults would install over the image"


def test_ray_refuses_a_misspelt_key() -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepare_config(CLUSTER), "max_worker": 8})


def test_workers_are_spot_and_the_head_is_not() -> None:
    assert WORKER["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in HEAD
    assert CLUSTER["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_ray_process_starts_with_the_token(commands: str) -> None:
    starts = [command for command in CLUSTER[commands] if "ray start" in command]
    assert len(starts) == 1
    assert starts[0].startswith("RAY_AUTH_MODE=token ray start")


def test_workers_watch_for_their_spot_notice() -> None:
    *_, start, watch = CLUSTER["worker_start_ray_commands"]
    assert "ray start" in start
    assert "python -m cluster.spot" in watch
    assert watch.endswith("&")
    assert not any("cluster.spot" in command for command in CLUSTER["head_start_ray_commands"])


def test_the_token_is_a_file_and_in_no_command() -> None:
    options = CLUSTER["docker"]["run_options"]
    (mounted,) = CLUSTER["file_mounts"]
    assert "--env RAY_AUTH_MODE=token" in options
    assert f"--env RAY_AUTH_TOKEN_PATH={mounted}/auth_token" in options
    assert "RAY_AUTH_TOKEN=" not in TEXT


def test_a_job_that_is_stopped_may_end_in_order_whatever_submitted_it() -> None:
    assert f"--env RAY_JOB_STOP_WAIT_TIME_S={job_env.STOP_SECONDS}" in CLUSTER["docker"]["run_options"]


def test_the_dashboard_is_not_on_the_network() -> None:
    start = next(command for command in CLUSTER["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("node", [HEAD, WORKER], ids=["head", "worker"])
def test_nodes_get_what_terraform_made_and_no_wide_defaults(node: dict[str, Any]) -> None:
    assert node["SecurityGroupIds"]
    assert node["SubnetIds"]
    assert node["IamInstanceProfile"]["Arn"]
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert all(device["Ebs"]["Encrypted"] for device in node["BlockDeviceMappings"])
    assert HEAD["IamInstanceProfile"] != WORKER["IamInstanceProfile"]


def test_the_ray_that_validates_is_the_ray_that_runs() -> None:
    assert f"ray=={ray.__version__} \\\n" in (INFRA.parent / "requirements.lock").read_text()
