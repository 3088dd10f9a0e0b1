"""Errors in a user's own module or factory: their lines are shown, not ours, and a name that is ours too is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import environment

from pipeline.base.errors import UserError
from pipeline.network.build import build_network
from pipeline.settings.model import Model

BUILD = "def build(classes=10):\n    return helper(classes)\n\n"


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, **modules: str) -> str:
    """What is said of the factory `build` of a module with this source."""
    for module, text in {name: source, **modules}.items():
        (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(UserError) as caught:
        build_network(Model.model_validate({"factory": f"{name}:build"}), 10)
    return str(caught.value)


def test_a_missing_import_in_the_users_module_shows_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(tmp_path, monkeypatch, "net_a", f"import os\nimport no_such_thing\n{BUILD}")
    assert f"No module named 'no_such_thing' (at {tmp_path}/net_a.py:2 in <module>: import no_such_thing)" in said
    assert "mend it" in said
    assert "factory.py" not in said
    assert "importlib" not in said


@pytest.mark.parametrize("error", ["OSError('no disk')", "SystemExit(3)", "NameError('x')", "ZeroDivisionError()"])
def test_whatever_a_factory_raises_is_one_message_with_its_own_lines(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"net_b{sum(map(ord, error))}"
    said = refused(tmp_path, monkeypatch, name, f"{BUILD}def helper(classes):\n    raise {error}\n")
    kind = error.partition("(")[0]
    assert f"{kind}" in said
    file = f"{tmp_path}/{name}.py"
    assert f"(at {file}:5 in helper: raise {error}, called at {file}:2 in build: return helper(classes))" in said
    assert "build.py" not in said


def test_an_error_within_a_library_shows_the_users_line_that_called_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from torch import nn\ndef build(classes=10):\n    return nn.Conv2d(1, 4, 3, groups=3)\n"
    said = refused(tmp_path, monkeypatch, "net_c", source)
    assert f"(at {tmp_path}/net_c.py:3 in build: return nn.Conv2d(1, 4, 3, groups=3))" in said
    assert "site-packages" not in said


def test_a_syntax_error_shows_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(tmp_path, monkeypatch, "net_d", "def build(:\n")
    assert f"{tmp_path}/net_d.py:1: def build(:" in said


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import pipeline.layers", "pipeline"),
        ("from cluster import Blocks", "cluster"),
        ("from pipeline.layers import Block", "pipeline"),
    ],
)
def test_a_package_of_the_users_with_our_name_is_named(
    line: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(tmp_path, monkeypatch, f"net_e{len(line)}", f"{line}\n{BUILD}")
    assert f"'{name}' is a package of secateur's own" in said
    assert "give your own another name" in said
    assert line in said


def test_a_factory_in_a_package_with_our_name_is_named() -> None:
    with pytest.raises(UserError, match=r"'pipeline' is a package of secateur's own"):
        build_network(Model.model_validate({"factory": "pipeline.mine:build"}), 10)


@pytest.mark.parametrize("module", ["cluster.cli", "cluster.train"])
def test_a_package_of_the_users_that_hides_ours_is_named(module: str, tmp_path: Path) -> None:
    """Their `pipeline` comes first on the path, as PYTHONPATH or a job's folder puts it."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/__init__.py").touch()
    ours = environment()["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=environment(PYTHONPATH=f"{tmp_path}:{ours}"),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: the package 'pipeline' in {tmp_path}/pipeline hides secateur's"), done.stderr
    assert "Traceback" not in done.stderr
