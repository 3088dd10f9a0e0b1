"""The locks: exact versions with hashes, no addresses, and the images' are parts of the repository's."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from infra_files import INFRA
from support import ROOT

LOCKS = [ROOT / "requirements.lock", ROOT / "requirements-tools.lock", *sorted(INFRA.rglob("requirements.lock"))]
LINE = re.compile(r"([a-z0-9-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _named(requirements: list[str]) -> set[str]:
    return {_plain(re.match(r"[\w.-]+", line)[0]) for line in requirements}  # type: ignore[index]


def locked(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """Version and hashes by package. Fails on a line that is anything else than a comment or a hashed package."""
    text = re.sub(r"\s*\\\n\s*", " ", path.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = [LINE.fullmatch(line) for line in lines]
    assert None not in found, [line for line, match in zip(lines, found, strict=True) if match is None]
    return {match[1]: (match[2], frozenset(match[3].split())) for match in found if match}


def test_all_are_found() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in LOCKS]
    assert names == [
        "requirements.lock",
        "requirements-tools.lock",
        "infra/docker/requirements.lock",
        "infra/mlflow/requirements.lock",
    ]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_package_has_a_version_and_hashes_and_no_address_is_named(path: Path) -> None:
    assert locked(path)
    assert "://" not in path.read_text()
    assert "--index" not in path.read_text()


def test_the_lock_is_what_is_installed_here() -> None:
    installed = {_plain(found.metadata["Name"]): found.version for found in metadata.distributions()}
    assert {name: installed.get(name) for name in locked(LOCKS[0])} == {
        name: version for name, (version, _) in locked(LOCKS[0]).items()
    }


def test_a_wheel_for_every_platform_is_let_in() -> None:
    # numpy 2 has some twenty wheels for Python 3.11 and later on Linux, macOS and Windows, and its source.
    assert len(locked(LOCKS[0])["numpy"][1]) > 20


def test_what_pyproject_names_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = _named(project["project"]["dependencies"])
    assert needed | _named(project["project"]["optional-dependencies"]["dev"]) <= set(locked(LOCKS[0]))
    assert _named(project["dependency-groups"]["tools"]) <= set(locked(ROOT / "requirements-tools.lock"))
    image = locked(INFRA / "docker/requirements.lock")
    assert needed <= set(image)
    assert not {"moto", "mypy", "pytest", "ruff"} & set(image)


@pytest.mark.parametrize(("image", "own"), [("docker", set()), ("mlflow", {"psycopg2-binary"})])
def test_an_image_gets_what_is_tested_here(image: str, own: set[str]) -> None:
    everything, held = locked(LOCKS[0]), locked(INFRA / image / "requirements.lock")
    assert {name for name in held if held[name] != everything.get(name)} == own


@pytest.mark.parametrize("name", ["Makefile", "infra/docker/Dockerfile", "infra/mlflow/server.Dockerfile"])
def test_pip_is_told_to_check_hashes(name: str) -> None:
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / name).read_text())
    installs = [line for line in text.splitlines() if re.search(r"(pip|PIP\)) install ", line)]
    assert installs
    for line in installs:
        own = "--no-deps --no-build-isolation" in line  # the package itself, by the setuptools that is locked
        assert own or "--require-hashes" in line, line
