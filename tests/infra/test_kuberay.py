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

from cluster import connect, job_env
from pipeline.cli.messages import MISTAKE, PASSING
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
    assert {*listed, "kustomization.yaml", "raycluster.yaml", "rayjob.yaml", "job.yaml"} == there


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
def test_a_job_that_is_stopped_may_end_in_order_whatever_submitted_it(name: str) -> None:
    """Ray's supervisor of a job runs on the head and reads its environment."""
    head = next(container for container in containers(OBJECTS[name]) if container["name"] == "ray-head")
    env = {variable["name"]: variable.get("value") for variable in head["env"]}
    assert env["RAY_JOB_STOP_WAIT_TIME_S"] == str(job_env.STOP_SECONDS)


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
    assert {6379, 8265, 10001, 8080} == set(ports)
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
        prometheus = {"app.kubernetes.io/name": "prometheus"}
        for node in (head, worker):
            assert _may_reach(prometheus, node, port, namespace="monitoring") == (port == 8080)
            assert not _may_reach(prometheus, node, port, namespace="elsewhere")


def test_no_pod_can_ask_the_node_for_its_credentials() -> None:
    blocks = [
        peer["ipBlock"]
        for rule in OBJECTS["NetworkPolicy/secateur-ray"]["spec"]["egress"]
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ]
    pod_identity = {"cidr": "169.254.170.23/32"}  # gives a pod its own role's, and no other's
    assert blocks == [{"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}, pod_identity]


def test_pods_reach_their_role_and_a_store_in_the_cluster() -> None:
    rules = OBJECTS["NetworkPolicy/secateur-ray"]["spec"]["egress"]
    ports = {json.dumps(rule["to"]): [entry["port"] for entry in rule["ports"]] for rule in rules if len(rule) == 2}
    assert ports[json.dumps([{"ipBlock": {"cidr": "169.254.170.23/32"}}])] == [80]
    (minio,) = [given for peers, given in ports.items() if "minio" in peers]
    assert minio == [9000]


@pytest.mark.parametrize("name", RAY)
def test_only_workers_see_gpus(name: str) -> None:
    spec = OBJECTS[name]["spec"]
    spec = spec.get("rayClusterSpec", spec)
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    for container in containers(OBJECTS[name]):
        env = {variable["name"]: variable.get("value") for variable in container["env"]}
        asks = "nvidia.com/gpu" in container["resources"]["limits"]
        assert (env.get("NVIDIA_VISIBLE_DEVICES") == "void") == (not asks), container["name"]


@pytest.mark.parametrize("name", RAY)
def test_the_autoscaler_is_version_2_whose_pods_are_never_restarted(name: str) -> None:
    spec = OBJECTS[name]["spec"]
    spec = spec.get("rayClusterSpec", spec)
    assert spec["autoscalerOptions"]["version"] == "v2"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert {group["template"]["spec"]["restartPolicy"] for group in groups} == {"Never"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve, which Ray's commands import
@pytest.mark.parametrize("name", RAY)
def test_a_worker_that_is_evicted_tells_ray_first(name: str) -> None:
    """The real command takes these options, and its deadline is within the time that the pod is given."""
    from ray.scripts.scripts import drain_node

    spec = OBJECTS[name]["spec"]
    (group,) = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
    pod = group["template"]["spec"]
    shell, flag, script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("/bin/bash", "-c")
    drain, wait = script.split("; ")
    program, command, *options = shlex.split(drain)
    assert (program, command) == ("ray", "drain-node")
    given = drain_node.make_context(command, list(options)).params
    assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    seconds = int(wait.removeprefix("sleep "))
    assert seconds < given["deadline_remaining_seconds"] < pod["terminationGracePeriodSeconds"] <= 120
    assert not any(
        budget["spec"]["selector"]["matchLabels"].get("ray.io/node-type") != "head"
        for kind, budget in OBJECTS.items()
        if kind.startswith("PodDisruptionBudget/")
    ), "a budget of the workers would hold the eviction up"


def test_no_eviction_of_the_head_goes_through() -> None:
    spec = OBJECTS["PodDisruptionBudget/secateur-head"]["spec"]
    assert (spec["maxUnavailable"], "minAvailable" in spec) == (0, False)


def test_the_job_ends_for_a_mistake_and_tries_again_for_what_may_pass() -> None:
    spec = OBJECTS["Job/secateur-"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]

    def action(code: int) -> str:
        """Kubernetes' rule: the first rule that matches; else the failure is counted."""
        for rule in spec["podFailurePolicy"]["rules"]:
            if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
                assert rule["onExitCodes"]["containerName"] == container["name"]
                assert rule["onExitCodes"]["operator"] == "In"
                return str(rule["action"])
        return "Count"

    assert {code: action(code) for code in (MISTAKE, PASSING, 1, 130)} == {
        2: "FailJob",
        75: "Count",
        1: "Count",
        130: "Count",
    }
    assert spec["backoffLimit"] > 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # which a podFailurePolicy needs
    assert spec["activeDeadlineSeconds"] == JOB["spec"]["activeDeadlineSeconds"]
    program, command, config, address, *overrides = [*container["command"], *container["args"]]
    assert (program, command) == ("secateur", "submit")
    assert address == "--address=http://secateur-head-svc.secateur.svc.cluster.local:8265"
    assert [config, *overrides] == [part.removeprefix("/app/") for part in shlex.split(JOB["spec"]["entrypoint"])[4:]]
    labels = spec["template"]["metadata"]["labels"]
    assert labels == JOB["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    context = container["securityContext"]
    assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)


def test_images_are_given_by_digest() -> None:
    """Which digest is for the user to fill in: an image that is not built has none."""
    images = [container["image"] for name in RAY for container in containers(OBJECTS[name])]
    images.append(OBJECTS["Job/secateur-"]["spec"]["template"]["spec"]["containers"][0]["image"])
    assert {image.partition("@")[2] for image in images} == {"DIGEST"}


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
