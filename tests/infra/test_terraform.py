"""Terraform: formatted, valid, and applied to moto's server and destroyed again; the policies it makes, read back.

All but lifecycle.tf is applied: the provider waits about 50 s for any lifecycle to settle, so that file is validated
and its text read. Ray's own AWS code then takes infra/aws/cluster.yaml, filled in with the outputs, on the same moto.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from infra_files import INFRA, cluster_yaml
from support import ROOT

PROVIDER = "hashicorp/aws/5.100.0"
BUCKET = "secateur-test"
OIDC = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/TEST"
Run = Callable[..., str]


def _plugins() -> Path:
    """A local mirror of providers that holds ours; tests download nothing."""
    given = [Path(os.environ["TF_PLUGIN_DIR"])] if os.environ.get("TF_PLUGIN_DIR") else []
    usual = [Path.home() / ".terraform.d/plugins", Path("/usr/share/terraform/plugins")]
    for folder in [*given, *usual, *sorted(Path("/opt").glob("*"))]:
        if next(folder.glob(f"*/{PROVIDER}"), None) is not None:
            return folder
    pytest.skip(f"no local mirror of Terraform providers has {PROVIDER}: set TF_PLUGIN_DIR to one")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of infra/terraform, so that no state lands in the repository."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not installed")
    copy = tmp_path_factory.mktemp("terraform")
    for path in (INFRA / "terraform").glob("*.tf"):
        shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def terraform(folder: Path, aws: dict[str, str]) -> Run:
    """Runs Terraform in the copy, initialised, and returns what it prints; a failure fails the test with it."""
    plugins = _plugins()
    (folder / "empty.rc").touch()
    env = {**aws, "TF_CLI_CONFIG_FILE": str(folder / "empty.rc"), "CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"}

    def run(*arguments: str) -> str:
        command = ["terraform", *arguments]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run("init", "-input=false", "-no-color", f"-plugin-dir={plugins}")
    return run


@pytest.fixture(scope="module")
def variables(folder: Path, aws: dict[str, str]) -> None:
    """terraform.tfvars of moto's account."""
    ec2 = _client("ec2", aws)
    subnet = ec2.describe_subnets()["Subnets"][0]
    values = {
        "region": aws["AWS_REGION"],
        "bucket": BUCKET,
        "vpc_id": subnet["VpcId"],
        "subnet_id": subnet["SubnetId"],
        "ami_id": ec2.describe_images()["Images"][0]["ImageId"],
        "key_name": "key",
        "admin_cidrs": ["203.0.113.7/32"],
        "oidc_provider_arn": OIDC,
    }
    (folder / "terraform.tfvars.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def outputs(terraform: Run, variables: None, folder: Path, aws: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Applied to moto; destroyed at the end, with nothing left behind."""
    (folder / "lifecycle.tf").rename(folder / "lifecycle.tf.not-applied")
    terraform("apply", "-auto-approve", "-input=false", "-no-color")
    yield {name: item["value"] for name, item in json.loads(terraform("output", "-json")).items()}
    _empty_logs(aws)
    terraform("destroy", "-auto-approve", "-input=false", "-no-color", "-refresh=false")
    assert _client("s3", aws).list_buckets()["Buckets"] == []
    assert _client("iam", aws).list_roles()["Roles"] == []


def _empty_logs(aws: dict[str, str]) -> None:
    """As a person must before the bucket of access logs can go; moto writes such logs too."""
    s3, logs = _client("s3", aws), f"{BUCKET}-logs"
    s3.put_bucket_logging(Bucket=BUCKET, BucketLoggingStatus={})
    s3.delete_bucket_policy(Bucket=logs)  # it refuses what does not come by TLS, as here
    for item in s3.list_objects_v2(Bucket=logs).get("Contents", []):
        s3.delete_object(Bucket=logs, Key=item["Key"])


def _client(service: str, aws: dict[str, str]) -> Any:
    return boto3.client(
        service,
        endpoint_url=aws["AWS_ENDPOINT_URL"],
        region_name=aws["AWS_REGION"],
        aws_access_key_id=aws["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=aws["AWS_SECRET_ACCESS_KEY"],
    )


def _statements(document: Any) -> dict[str, dict[str, Any]]:
    document = json.loads(document) if isinstance(document, str) else document
    return {statement.get("Sid", ""): statement for statement in document["Statement"]}


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def test_files_are_formatted(folder: Path) -> None:
    done = subprocess.run(
        ["terraform", "fmt", "-check", "-diff", str(INFRA / "terraform")],
        env={**os.environ, "TF_CLI_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_module_is_valid_and_its_provider_is_pinned(terraform: Run) -> None:
    assert json.loads(terraform("validate", "-json"))["valid"]
    assert 'version = "5.100.0"' in (INFRA / "terraform/versions.tf").read_text()


def test_old_versions_and_torn_uploads_expire_and_nothing_else_but_logs() -> None:
    whole = (INFRA / "terraform/lifecycle.tf").read_text()
    text, logs = whole.split('resource "aws_s3_bucket_lifecycle_configuration" "logs"')
    assert text.count('status = "Enabled"') == text.count("rule {") == 3
    assert re.search(
        r'prefix = "\$\{var\.runs_prefix\}/"\s+\}\s+noncurrent_version_expiration \{\s+'
        r"noncurrent_days = var\.runs_noncurrent_days\s+\}",
        text,
    )
    assert re.search(r"expiration \{\s+days = var\.access_log_days\s+\}", logs)
    assert re.search(r"noncurrent_version_expiration \{\s+noncurrent_days = var\.noncurrent_days\s+\}", text)
    assert re.search(r"abort_incomplete_multipart_upload \{\s+days_after_initiation = \d\s+\}", text)
    assert not re.search(r"^\s+(days|date)\s*=", text, re.MULTILINE), "an object in use would expire"


def test_the_bucket_is_closed_encrypted_and_versioned(outputs: dict[str, Any], aws: dict[str, str]) -> None:
    s3 = _client("s3", aws)
    assert outputs["runs_dir"] == f"s3://{BUCKET}/runs"
    assert s3.get_bucket_versioning(Bucket=BUCKET)["Status"] == "Enabled"
    block = s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]
    assert list(block.values()) == [True] * 4
    rules = s3.get_bucket_encryption(Bucket=BUCKET)["ServerSideEncryptionConfiguration"]["Rules"]
    aliases = _client("kms", aws).list_aliases()["Aliases"]
    (key,) = [entry["TargetKeyId"] for entry in aliases if entry["AliasName"] == "alias/secateur"]
    default = rules[0]["ApplyServerSideEncryptionByDefault"]
    assert default["SSEAlgorithm"] == "aws:kms"
    assert default["KMSMasterKeyID"].endswith(f":key/{key}")
    assert rules[0]["BucketKeyEnabled"]
    assert _client("kms", aws).get_key_rotation_status(KeyId=key)["KeyRotationEnabled"]
    deny = _statements(s3.get_bucket_policy(Bucket=BUCKET)["Policy"])["TlsOnly"]
    assert (deny["Effect"], deny["Action"], deny["Principal"]) == ("Deny", "s3:*", "*")
    assert deny["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert deny["Resource"] == [f"arn:aws:s3:::{BUCKET}/*", f"arn:aws:s3:::{BUCKET}"]


def test_access_is_logged_into_a_closed_bucket_that_only_s3_writes(
    outputs: dict[str, Any], aws: dict[str, str]
) -> None:
    s3, logs = _client("s3", aws), f"{BUCKET}-logs"
    assert s3.get_bucket_logging(Bucket=BUCKET)["LoggingEnabled"]["TargetBucket"] == logs
    written = s3.list_objects_v2(Bucket=logs)["Contents"]
    assert written
    assert all(item["Key"].startswith("s3/") for item in written)
    block = s3.get_public_access_block(Bucket=logs)["PublicAccessBlockConfiguration"]
    assert list(block.values()) == [True] * 4
    statements = _statements(s3.get_bucket_policy(Bucket=logs)["Policy"])
    writes = statements["AccessLogs"]
    assert (writes["Action"], writes["Principal"]) == ("s3:PutObject", {"Service": "logging.s3.amazonaws.com"})
    assert writes["Condition"]["ArnEquals"] == {"aws:SourceArn": f"arn:aws:s3:::{BUCKET}"}
    assert statements["TlsOnly"]["Effect"] == "Deny"
    assert len(statements) == 2


def test_every_role_may_read_shards_and_keep_runs_and_no_more(outputs: dict[str, Any], aws: dict[str, str]) -> None:
    iam = _client("iam", aws)
    roles = [role["RoleName"] for role in iam.list_roles()["Roles"]]
    assert sorted(roles) == ["secateur-head", "secateur-pod", "secateur-worker"]
    attached = {r: iam.list_attached_role_policies(RoleName=r)["AttachedPolicies"] for r in roles}
    assert {tuple(p["PolicyName"] for p in policies) for policies in attached.values()} == {("secateur-storage",)}
    arn = attached["secateur-head"][0]["PolicyArn"]
    version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
    storage = _statements(iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"])
    allowed = {
        (action, resource)
        for statement in storage.values()
        for action in _list(statement["Action"])
        for resource in _list(statement["Resource"])
    }
    bucket = f"arn:aws:s3:::{BUCKET}"
    runs = {"GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts"}
    assert allowed == {
        ("s3:GetObject", f"{bucket}/shards/*"),
        *((f"s3:{action}", f"{bucket}/runs/*") for action in runs),
        ("s3:ListBucket", bucket),
        ("s3:ListBucketMultipartUploads", bucket),
        *((f"kms:{action}", storage["UseKey"]["Resource"]) for action in ("Decrypt", "GenerateDataKey")),
    }
    assert ":key/" in storage["UseKey"]["Resource"]
    assert storage["UseKey"]["Condition"] == {"StringEquals": {"kms:ViaService": "s3.eu-central-1.amazonaws.com"}}
    assert storage["ListBoth"]["Condition"] == {"StringLike": {"s3:prefix": ["shards/*", "runs/*"]}}


def test_only_the_head_starts_instances_and_only_its_own_kind(outputs: dict[str, Any], aws: dict[str, str]) -> None:
    iam = _client("iam", aws)
    inline = {
        role: iam.list_role_policies(RoleName=role)["PolicyNames"] for role in ("secateur-worker", "secateur-pod")
    }
    assert inline == {"secateur-worker": [], "secateur-pod": []}
    document = iam.get_role_policy(RoleName="secateur-head", PolicyName="autoscaler")["PolicyDocument"]
    for name, statement in _statements(document).items():
        actions, resources = _list(statement["Action"]), _list(statement["Resource"])
        assert not any(action.endswith("*") for action in actions)
        assert "*" not in resources or all(action.startswith("ec2:Describe") for action in actions), name
    statements = _statements(document)
    tag = {"aws:RequestTag/ray-cluster-name": "secateur"}
    assert statements["StartTagged"]["Condition"]["StringEquals"] == tag
    assert statements["StartTagged"]["Condition"]["ArnEquals"]["ec2:InstanceProfile"].endswith("/secateur-worker")
    assert statements["ManageTagged"]["Condition"]["StringEquals"] == {"ec2:ResourceTag/ray-cluster-name": "secateur"}
    assert statements["PassWorkerRole"]["Resource"].endswith(":role/secateur-worker")


def test_the_pods_role_trusts_the_accounts_of_the_manifests(outputs: dict[str, Any], aws: dict[str, str]) -> None:
    role = _client("iam", aws).get_role(RoleName="secateur-pod")["Role"]
    assert outputs["pod_role_arn"] == role["Arn"]
    (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Federated": OIDC}
    subjects = trust["Condition"]["StringEquals"][f"{OIDC.split('oidc-provider/')[1]}:sub"]
    assert sorted(subjects) == [f"system:serviceaccount:secateur:secateur-{who}" for who in ("head", "worker")]


def test_nothing_is_open_to_the_world(outputs: dict[str, Any], aws: dict[str, str]) -> None:
    groups = _client("ec2", aws).describe_security_groups()["SecurityGroups"]
    groups = {group["GroupName"]: group for group in groups if group["GroupName"].startswith("secateur-")}
    assert sorted(groups) == ["secateur-head", "secateur-ray"]
    (inside,) = groups["secateur-ray"]["IpPermissions"]
    assert inside["IpProtocol"] == "-1"
    assert inside["IpRanges"] == []
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [groups["secateur-ray"]["GroupId"]]
    (ssh,) = groups["secateur-head"]["IpPermissions"]
    assert (ssh["FromPort"], ssh["ToPort"]) == (22, 22)
    assert [item["CidrIp"] for item in ssh["IpRanges"]] == ["203.0.113.7/32"]


BOOTSTRAP = """
import json, sys, yaml
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
config = prepare_config(yaml.safe_load(sys.stdin))
validate_config(config)
print(json.dumps(AWSNodeProvider.bootstrap_config(config)))
"""


def test_ray_up_takes_the_filled_in_cluster_and_makes_nothing_of_its_own(
    outputs: dict[str, Any], aws: dict[str, str]
) -> None:
    filled = cluster_yaml(outputs["ray_up_sed"])
    env = {**aws, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BOOTSTRAP],
        input=filled,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout.splitlines()[-1])
    types = config["available_node_types"]
    groups = _client("ec2", aws).describe_security_groups()["SecurityGroups"]
    by_id = {group["GroupId"]: group["GroupName"] for group in groups}
    given = {name: [by_id[g] for g in types[name]["node_config"]["SecurityGroupIds"]] for name in types}
    assert given == {"head": ["secateur-ray", "secateur-head"], "gpu-spot": ["secateur-ray"]}
    assert not any(name.startswith("ray-autoscaler") for name in by_id.values())
    for name, profile in {"head": "secateur-head", "gpu-spot": "secateur-worker"}.items():
        assert types[name]["node_config"]["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{profile}")
