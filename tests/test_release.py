"""The wheel and the sdist: what is in them, and that they work in another environment, outside of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from mypy.modulefinder import FindModuleCache, SearchPaths
from support import ROOT

from pipeline.base.version import VERSION

pytestmark = pytest.mark.slow

SOURCES = (
    "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "secateur.py", "pipeline",
    "cluster", "configs", "tests",
)  # fmt: skip
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(kind: str, source: Path, out: Path) -> None:
    """Build `kind` (sdist or wheel) of a source tree, with the setuptools of this environment."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built of what the sdist holds."""
    home = tmp_path_factory.mktemp("release")
    source, out = home / "source", home / "dist"
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, source / name)
    build("sdist", source, out)
    with tarfile.open(out / f"secateur-{VERSION}.tar.gz") as sdist:
        sdist.extractall(home / "unpacked", filter="data")
    build("wheel", home / "unpacked" / f"secateur-{VERSION}", out)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"secateur-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; it reads other packages where this one has them, but not its secateur."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin/python"), "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return home


def run(installed: Path, cwd: Path, *command: str) -> str:
    """What a program of the environment prints, from a folder that is not the repository's."""
    outer = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done: Any = subprocess.run(
        [str(installed / "bin" / command[0]), *command[1:]], cwd=cwd, env=outer, capture_output=True, text=True,
        check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_the_sdist_holds_what_the_wheel_is_built_of_and_no_tests(built: Path) -> None:
    with tarfile.open(built / f"secateur-{VERSION}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "setup.py", "secateur.py", "configs/demo.yaml", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.startswith(("tests", "runs", "infra", ".git"))]


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"secateur-{VERSION}.dist-info/METADATA").decode()
    wanted = {
        str(path.relative_to(ROOT)): path
        for package in ("pipeline", "cluster")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {"secateur/__init__.py": ROOT / "secateur.py", "secateur/demo.yaml": ROOT / "configs/demo.yaml"}
    assert held == {name: path.read_bytes() for name, path in wanted.items()} | {"secateur/py.typed": b""}
    assert {"pipeline/settings/schema.json", "pipeline/results/result.schema.json"} <= held.keys()
    assert {"pipeline/results/report.html", "pipeline/results/card.md", "pipeline/py.typed"} <= held.keys()
    assert f"\nVersion: {VERSION}\n" in metadata


def test_its_programs_work_outside_of_the_repository(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "secateur", "--version") == f"secateur {VERSION}\n"
    assert run(installed, tmp_path, "python", "-m", "pipeline", "--version") == f"secateur {VERSION}\n"
    shown = run(installed, tmp_path, "secateur", "--help")
    assert all(word in shown for word in ("demo", "init", "plan", "run", "doctor"))
    assert "wrote mine.yaml" in run(installed, tmp_path, "secateur", "init", "--data", "digits", "--out", "mine.yaml")
    assert "lenet_300_100" in run(installed, tmp_path, "secateur", "plan", "mine.yaml")
    schema = (tmp_path / "mine.yaml").read_text().splitlines()[0].partition("$schema=")[2]
    assert Path(schema).is_relative_to(installed)
    assert Path(schema).is_file()


def test_the_demo_runs_in_the_current_folder(installed: Path, tmp_path: Path) -> None:
    """With fewer epochs, and without Ray, which takes long to start."""
    short = ["dense.epochs=2", "retrain.epochs=1", "prune.rounds=1", "prune.allocation=uniform"]
    shown = run(installed, tmp_path, "python", "-m", "pipeline", "demo", *short, "tracking.enabled=false")
    assert "compression" in shown
    assert f'"secateur": "{VERSION}"' in (tmp_path / "runs/demo/result.json").read_text()
    assert re.search(rf">secateur</th><td[^>]*>{re.escape(VERSION)}<", (tmp_path / "runs/demo/report.html").read_text())


def test_the_demos_config_names_the_schema_beside_it(installed: Path, tmp_path: Path) -> None:
    shown = run(
        installed, tmp_path, "python", "-c", "from pipeline.cli import shared; print(shared.demo_config(), end='')"
    )
    config = Path(shown)
    assert config.is_relative_to(installed)
    schema = config.read_text().splitlines()[0].partition("$schema=")[2]
    assert (config.parent / schema).is_file()


def test_type_checkers_believe_its_types(installed: Path) -> None:
    (site,) = installed.glob("lib/python*/site-packages")
    search = SearchPaths(python_path=(), mypy_path=(), package_path=(str(site),), typeshed_path=())
    finder = FindModuleCache(search, fscache=None, options=None)
    for name in ("secateur", "pipeline.settings.config"):
        assert str(finder.find_module(name)).startswith(str(site))
