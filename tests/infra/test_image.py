"""Dockerfiles: hadolint, and our own rules: pinned, not root, nothing fetched by hand, nothing let in unasked."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from infra_files import INFRA
from support import ROOT

from pipeline.base.version import VERSION

DOCKERFILES = sorted([*INFRA.rglob("Dockerfile"), *INFRA.rglob("*.Dockerfile")])
IMAGE = INFRA / "docker/Dockerfile"


def _instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of each line, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(words[0].upper(), words[1]) for line in joined.splitlines() if len(words := line.split(None, 1)) == 2]


def test_all_are_found() -> None:
    assert [path.relative_to(INFRA).as_posix() for path in DOCKERFILES] == [
        "docker/Dockerfile",
        "mlflow/server.Dockerfile",
        "mlflow/store.Dockerfile",
    ]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_is_content(path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_bases_are_pinned_to_a_full_version(path: Path) -> None:
    stages = set()
    arguments_of = [arguments.partition("=") for name, arguments in _instructions(path) if name == "ARG"]
    bases = {f"${{{name}}}": value for name, _, value in arguments_of}
    for name, arguments in _instructions(path):
        if name == "FROM":
            image, *alias = arguments.split()
            image = bases.get(image, image)
            assert image in stages or re.search(r":\d+\.\d+(\.\d+)?(-|$)|@sha256:[0-9a-f]{64}$", image), image
            stages |= set(alias[1:])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_last_user_is_a_number_and_not_root(path: Path) -> None:
    users = [arguments for name, arguments in _instructions(path) if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_nothing_is_fetched_by_hand_and_nothing_secret_is_set(path: Path) -> None:
    instructions = _instructions(path)
    assert "ADD" not in {name for name, _ in instructions}
    for name, arguments in instructions:
        if name == "RUN":
            assert not re.search(r"\b(curl|wget|git)\s+(\S+\s+)*\S+://", arguments)
        if name in ("ENV", "ARG"):
            assert not re.search(r"(TOKEN|PASSWORD|SECRET|ACCESS_KEY)\w*=", arguments)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_build_context_is_closed_but_for_what_is_named(path: Path) -> None:
    lines = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert all((ROOT / name).exists() for name in allowed)
    assert not {"tests", "runs", ".git", ".env", "infra/mlflow/.env"} & set(allowed)


def test_the_image_has_what_pip_reads_and_what_it_copies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    needed = {"infra/docker/requirements.lock", "pyproject.toml", project["project"]["readme"], "configs", *packages}
    needed |= set(project["project"]["license-files"])
    needed |= {"setup.py", *(f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"])}
    allowed = (INFRA / "docker/Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in needed} <= set(allowed)


def test_the_image_serves_ray() -> None:
    text = IMAGE.read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"]
    assert f"ARG PYTHON_BASE=python:{version}." in text
    for tool in ("wget", "rsync", "openssh-client"):
        assert re.search(rf"\b{tool}\b", text)
    assert re.search(r"^ENV RAY_AUTH_MODE=token", text, re.MULTILINE)


def test_the_image_is_named_by_the_version() -> None:
    files = [*INFRA.rglob("*.yaml"), *INFRA.rglob("*.md"), IMAGE]
    named = {tag for path in files for tag in re.findall(r"secateur:(\d[\w.]*)", path.read_text())}
    assert named == {VERSION}
