"""The files of infra/, parsed."""

from __future__ import annotations

import subprocess
from typing import Any

import yaml
from support import ROOT

INFRA = ROOT / "infra"


def manifests() -> dict[str, dict[str, Any]]:
    """Kubernetes objects by "Kind/name"; one whose name the cluster makes up goes by its generateName."""
    found = {}
    for path in sorted((INFRA / "kuberay").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] != "Kustomization":
                metadata = document["metadata"]
                found[f"{document['kind']}/{metadata.get('name') or metadata['generateName']}"] = document
    return found


def pod_templates(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod templates of a RayCluster or RayJob: head, worker groups and, of a job, its submitter."""
    spec = item["spec"]
    submitter = [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
    spec = spec.get("rayClusterSpec", spec)
    return [spec["headGroupSpec"]["template"], *[group["template"] for group in spec["workerGroupSpecs"]], *submitter]


def containers(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Containers of these templates."""
    return [container for template in pod_templates(item) for container in template["spec"]["containers"]]


def cluster_yaml(sed: str) -> str:
    """infra/aws/cluster.yaml with what Terraform's output ray_up_sed puts into it, by the real sed."""
    command = ["sed", "-f", "/dev/stdin", str(INFRA / "aws/cluster.yaml")]
    return subprocess.run(command, input=sed, capture_output=True, text=True, check=True).stdout
