"""The Kubernetes manifests: their schema, and what they promise about tokens, users, ports and resuming.

Kubernetes' own kinds and every pod template are checked against its strict JSON Schema; KubeRay's layer against
kuberay.schema.json beside this file, which says how far it goes. No operator runs here.
"""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from infra_files import INFRA, containers, manifests, pod_templates
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource
from support import ROOT

from cluster import connect
from pipeline.settings.config import load_config

KUBERNETES = "1.37"
OBJECTS = manifests()
PLAIN = [name for name in OBJECTS if not name.startswith("Ray")]
RAY = [name for name in OBJECTS if name.startswith("Ray")]
CLUSTER = OBJECTS["RayCluster/secateur"]
JOB = OBJECTS["RayJob/secateur-"]


@pytest.fixture(scope="module")
def kuberay() -> jsonschema.Draft202012Validator:
    schema = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
    folder = f"kubernetes-json-schema/v{kubernetes_validate.latest_version()}-local-strict"
    definitions = Resource.from_contents(schema_contents(f"{folder}/_definitions.json", KUBERNETES))
    registry = definitions @ Registry()
    return jsonschema.Draft202012Validator(schema, registry=registry)


@pytest.mark.parametrize("name", PLAIN)
def test_kubernetes_takes_each_object(name: str) -> None:
    kubernetes_validate.validate(OBJECTS[name], KUBERNETES, strict=True)


@pytest.mark.parametrize("name", RAY)
def test_kuberay_takes_each_object(name: str, kuberay: jsonschema.Draft202012Validator) -> None:
    kuberay.validate(OBJECTS[name])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "workerGroupSpec"], []),
        (["spec", "workerGroupSpecs", 0, "minReplicas"], "2"),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "headGroupSpec", "template", "spec", "containers", 0, "securityContext", "runAsRoot"], False),
        (["spec", "headGroupSpec", "template", "spec", "containers", 0, "env", 0, "val"], "token"),
        (["spec", "authOptions", "mode"], "on"),
    ],
)
def test_the_schema_refuses_mistakes(path: list[Any], value: Any, kuberay: jsonschema.Draft202012Validator) -> None:
    broken = copy.deepcopy(CLUSTER)
    node: Any = broken
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert not kuberay.is_valid(broken)


def test_the_kustomization_holds_all_that_stays() -> None:
    listed = yaml.safe_load((INFRA / "kuberay/kustomization.yaml").read_text())["resources"]
    there = {path.name for path in (INFRA / "kuberay").glob("*.yaml")}
    assert {*listed, "kustomization.yaml", "raycluster.yaml", "rayjob.yaml"} == there


def test_the_job_runs_on_the_cluster_that_raycluster_yaml_describes() -> None:
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]
    assert CLUSTER["spec"]["rayVersion"] == ray.__version__


@pytest.mark.parametrize("name", RAY)
def test_every_ray_process_starts_with_the_token_of_the_secret(name: str) -> None:
    spec = OBJECTS[name]["spec"]
    spec = spec.get("rayClusterSpec", spec)
    assert spec["authOptions"] == {"mode": "token", "secretName": "secateur-ray-token"}
    environments = [container["env"] for container in containers(OBJECTS[name])] + [spec["autoscalerOptions"]["env"]]
    assert len(environments) == (4 if name.startswith("RayJob") else 3)
    for variables in environments:
        env = {variable["name"]: variable for variable in variables}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "secateur-ray-token", "key": "auth_token"}


@pytest.mark.parametrize("name", RAY)
def test_pods_meet_the_restricted_standard_that_their_namespace_enforces(name: str) -> None:
    assert OBJECTS["Namespace/secateur"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for template in pod_templates(OBJECTS[name]):
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"]
        assert pod["runAsUser"] == 1000
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in template["spec"]["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]
            assert not container["image"].endswith(":latest")
            mounts = container["volumeMounts"]
            home = next(variable["value"] for variable in container["env"] if variable["name"] == "HOME")
            assert {"/tmp", home} <= {mount["mountPath"] for mount in mounts}
            assert {mount["name"] for mount in mounts} == {volume["name"] for volume in template["spec"]["volumes"]}


@pytest.mark.parametrize("name", RAY)
def test_only_the_head_may_talk_to_kubernetes(name: str) -> None:
    for template in pod_templates(OBJECTS[name]):
        account = OBJECTS[f"ServiceAccount/{template['spec']['serviceAccountName']}"]
        is_head = template["spec"]["containers"][0]["name"] == "ray-head"
        assert template["spec"].get("automountServiceAccountToken", True) == is_head
        assert account.get("automountServiceAccountToken", True) == is_head


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector of equalities holds for labels; others are not used here."""
    assert set(selector) <= {"matchLabels"}
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _may_reach(source: dict[str, str], target: dict[str, str], port: int, namespace: str = "secateur") -> bool:
    """Kubernetes' rule: a pod that some ingress policy selects takes only what one of those policies lets in."""
    policies = [item["spec"] for name, item in OBJECTS.items() if name.startswith("NetworkPolicy/")]
    policies = [p for p in policies if "Ingress" in p["policyTypes"] and _selects(p["podSelector"], target)]
    for rule in [rule for policy in policies for rule in policy.get("ingress", [])]:
        if "ports" in rule and port not in [entry["port"] for entry in rule["ports"]]:
            continue
        for peer in rule.get("from", [{}]):
            home = {"kubernetes.io/metadata.name": namespace}
            where = (
                _selects(peer["namespaceSelector"], home) if "namespaceSelector" in peer else namespace == "secateur"
            )
            if where and _selects(peer.get("podSelector", {}), source):
                return True
    return not policies


def _labels(template: dict[str, Any], kind: str) -> dict[str, str]:
    """A pod's labels once KubeRay has added its own."""
    return {**template["metadata"]["labels"], "ray.io/node-type": kind}


def test_the_network_policy_lets_in_the_cluster_and_the_submitter_and_nobody_else() -> None:
    spec = JOB["spec"]["rayClusterSpec"]
    head = _labels(spec["headGroupSpec"]["template"], "head")
    worker = _labels(spec["workerGroupSpecs"][0]["template"], "worker")
    submitter = JOB["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    ports = [port["containerPort"] for port in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]]
    assert {6379, 8265, 10001} == set(ports)
    for port in [*ports, 10002, 45678]:
        assert _may_reach(worker, head, port)
        assert _may_reach(head, worker, port)
        assert not _may_reach({"app": "stranger"}, head, port)
        assert not _may_reach({"app": "stranger"}, worker, port)
        assert not _may_reach(worker, head, port, namespace="elsewhere")
        assert not _may_reach(submitter, worker, port)
        assert not _may_reach(worker, submitter, port)
        assert _may_reach(submitter, head, port) == (port == 8265)
        assert _may_reach(operator, head, port, namespace="kuberay-system") == (port == 8265)
        assert not _may_reach(operator, head, port, namespace="elsewhere")


def test_no_pod_can_ask_the_node_for_its_credentials() -> None:
    blocks = [
        peer["ipBlock"]
        for rule in OBJECTS["NetworkPolicy/secateur-ray"]["spec"]["egress"]
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ]
    assert blocks == [{"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}]


def test_a_head_that_dies_is_followed_by_one_that_resumes() -> None:
    spec = JOB["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    python, flag, module, command, config, *overrides = shlex.split(spec["entrypoint"])
    assert (python, flag, module, command) == ("python", "-m", "cluster", "run")
    loaded = load_config(ROOT / Path(config).relative_to("/app"), overrides)
    assert loaded.runs_dir.startswith("s3://")
    assert str(loaded.data.root).startswith("s3://")
    connect.require_shared_paths(loaded, "a job")


def test_the_smallest_cluster_has_what_the_run_asks_for() -> None:
    spec = JOB["spec"]
    _, _, _, _, config, *overrides = shlex.split(spec["entrypoint"])
    loaded = load_config(ROOT / Path(config).relative_to("/app"), overrides)
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    has = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
    assert connect.shortage([has] * group["minReplicas"], loaded) is None
