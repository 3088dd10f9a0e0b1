"""No secret stands in infra/, and no Ray process starts there without a token."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
import yaml
from infra_files import INFRA
from support import ROOT

# What a person's own values go into; git must not take it.
OWN = {".env", ".terraform", ".terraform.lock.hcl", "terraform.tfvars", "terraform.tfstate", "terraform.tfstate.backup"}
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file() and not OWN & set(path.relative_to(INFRA).parts))
SECRET = {
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"BEGIN [A-Z ]*PRIVATE KEY",
    "a long random string": r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{32,}\b|\b[A-Za-z0-9+/]{40,}={0,2}(?![\w/.-])",
    "a password in a URL": r"://[^/\s:@]+:[^/\s@{<$]+@",
    "a value for a secret": r"(?i)(password|secret|token|access_key|session_key)\w*[\"']?[ \t]*[=:][ \t]*"
    r"[\"']?(?![\"'$<{\[]|\.\.\.)[A-Za-z0-9+/_-]{12,}",
}
# What the patterns also see: names of settings and of Kubernetes objects, paths, and hashes of packages.
NOT_SECRET = re.compile(
    r"RAY_AUTH_TOKEN_PATH=\S+|secretName: [a-z-]+|/home/secateur/token: \S+|auth_token=\"\$\("
    r"|--hash=sha256:[0-9a-f]{64}"
)


def found(text: str) -> list[str]:
    """What in a text looks like a secret."""
    return [name for name, pattern in SECRET.items() if re.search(pattern, NOT_SECRET.sub("", text))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(INFRA).as_posix())
def test_no_file_holds_a_secret(path: Path) -> None:
    assert found(path.read_text()) == []
    assert path.suffix not in {".pem", ".key"}


def test_git_ignores_what_holds_a_persons_own_values() -> None:
    patterns = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    for name in OWN:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize(
    "text",
    [
        "AWS_ACCESS_KEY_ID: AKIAABCDEFGHIJKLMNOP",
        "-----BEGIN RSA PRIVATE KEY-----",
        "RAY_AUTH_TOKEN=0f1e2d3c4b5a69788796a5b4c3d2e1f0",
        "value: wJalrXUtnFEMIK7MDENGbPxRfiCYzzzzzzzzzzzzKEY0",
        "postgresql://mlflow:hunter2@postgres/mlflow",
        "POSTGRES_PASSWORD=correct-horse-battery",
        'auth_token: "swordfish-swordfish"',
    ],
)
def test_the_search_would_find_one(text: str) -> None:
    assert found(text)


def _ray_starts() -> list[tuple[str, str]]:
    """(file, line) of everything below infra/ that starts or submits to Ray, manifests aside (test_kuberay.py)."""
    lines = [(path, line) for path in FILES for line in path.read_text().splitlines()]
    return [(path.relative_to(INFRA).as_posix(), line) for path, line in lines if re.search(r"\bray start\b", line)]


def test_every_ray_start_says_token() -> None:
    starts = [(name, line) for name, line in _ray_starts() if not line.lstrip().startswith("#")]
    assert starts
    for name, line in starts:
        text = (INFRA / name).read_text()
        assert "RAY_AUTH_MODE=token ray start" in line or "export RAY_AUTH_MODE=token" in text, f"{name}: {line}"


def test_nothing_turns_tokens_off() -> None:
    for path in FILES:
        assert not re.search(r"RAY_AUTH_MODE\W+(value\W+)?disabled|mode: disabled", path.read_text()), path


def test_manifests_hold_no_secret_objects() -> None:
    for path in (INFRA / "kuberay").glob("*.yaml"):
        assert "Secret" not in [document["kind"] for document in yaml.safe_load_all(path.read_text())]
