"""Configs and runs from anybody: they name no code to run, no server for credentials, and no file outside of a run."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_files import config as run_config
from run_files import whole
from torch import nn
from web_server import Quiet, serving

from cluster.cli import command_line as cluster_main
from pipeline.__main__ import command_line as pipeline_main
from pipeline.base.errors import UserError
from pipeline.network.build import build_network
from pipeline.settings.config import load_config
from pipeline.settings.model import Model

Said = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Carry out a command line that must end in one message and code 2; returns the message."""

    def command(*args: str, main: Callable[[], None] = cluster_main) -> str:
        monkeypatch.setattr(sys, "argv", ["secateur", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        written = capsys.readouterr()
        assert ended.value.code == 2, written
        assert "Traceback" not in written.out + written.err
        (error,) = [line for line in written.err.splitlines() if line.startswith("error: ")]
        return error

    return command


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A factory in the working directory whose import leaves a marker."""
    (tmp_path / "evil_factory.py").write_text(
        "from torch import nn\n"
        f"open({str(tmp_path / 'MARKER')!r}, 'w').close()\n"
        "def build(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    sys.modules.pop("evil_factory", None)
    return "evil_factory:build"


def stranger(tmp_path: Path, **sections: Any) -> Path:
    """The folder of a whole run, of somebody else, with these settings."""
    run = whole(run_config(tmp_path / "theirs"))
    tree = yaml.safe_load((run / "config.yaml").read_text())
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(section, dict) else section
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return run


# code ----------------------------------------------------------------------------------------------------------------


def test_a_run_from_anybody_names_no_code(tmp_path: Path, evil: str, refused: Said, secateur: Said) -> None:
    digits = {"source": "digits", "size": 8, "mean": [0.3], "std": [0.38], "lanes": 8}
    run = stranger(tmp_path, data=digits, model={"factory": evil, "kwargs": {}})
    config = str(run / "config.yaml")
    for args in (["bench", str(run)], ["plan", config], ["scan", config, "--after", "1"], ["run", config]):
        text = refused(*args)
        assert "evil_factory:build" in text
        assert "--trust-code" in text
    assert "--trust-code" in refused("run", config, main=pipeline_main)
    assert "--trust-code" in refused("plan", (tmp_path / "theirs/lenet").as_uri() + "/config.yaml")
    secateur("report", str(run))  # needs no network
    assert not (tmp_path / "MARKER").exists()
    mine = tmp_path / "mine.yaml"
    shutil.copy(config, mine)
    more = ["prune.allocation=uniform", "target.compression=2", "prune.rounds=1"]
    assert "evil_factory:build" in secateur("plan", config, "--trust-code", *more)
    assert (tmp_path / "MARKER").exists()
    assert "evil_factory:build" in secateur("plan", str(mine), *more)  # the user's own file is the user's word


def test_a_config_from_a_url_names_no_code(
    evil: str, files: Callable[[Path], str], tmp_path: Path, refused: Said
) -> None:
    (tmp_path / "web").mkdir()
    data = {"source": "digits", "size": 64, "resize": 64}
    for name, factory in (("c", evil), ("torchvision", "torchvision.models.alexnet")):
        tree = {"name": "a", "data": data, "model": {"factory": factory}}
        (tmp_path / f"web/{name}.yaml").write_text(yaml.safe_dump(tree))
    url = files(tmp_path / "web")
    assert "--trust-code" in refused("plan", f"{url}/c.yaml")
    assert "--trust-code" in refused("submit", f"{url}/c.yaml")
    assert not (tmp_path / "MARKER").exists()
    assert "--trust-code" not in refused("plan", f"{url}/torchvision.yaml")  # built: it takes three channels


@pytest.mark.parametrize(
    "factory",
    [
        "os:system", "os.system", "posix:system", "shutil:rmtree", "subprocess:run", "subprocess.Popen",
        "builtins:open", "builtins.exec", "webbrowser:open", "pathlib:Path", "torch:save",
        "torchvision.models.resnet:partial", "torchvision.models.alexnet:torch", "torchvision.models._api:os.system",
        "pipeline.storage.local:shutil.rmtree", "pipeline.storage:remove_tree", "pipeline.storage:write_bytes",
    ],
)  # fmt: skip
def test_what_makes_no_network_is_not_called(factory: str, tmp_path: Path) -> None:
    kwargs = {"command": f"touch {tmp_path}/MARKER", "folder": str(tmp_path), "path": str(tmp_path)}
    (tmp_path / "there").touch()
    for each in kwargs:
        with pytest.raises(UserError, match=rf"model\.factory='{factory}'"):
            build_network(Model(factory=factory, kwargs={each: kwargs[each]}))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


class Net(nn.Linear):
    @classmethod
    def of(cls, width: int) -> Net:
        return cls(width, width)


narrow = functools.partial(Net.of, width=2)
unannotated = functools.partial(functools.partial(lambda **kwargs: nn.Linear(**kwargs), in_features=1))


def typed(width: int) -> "Nowhere":  # type: ignore[name-defined]  # noqa: F821, UP037
    return nn.Linear(width, width)


@pytest.mark.parametrize(
    ("factory", "kwargs"),
    [
        ("Net", {"in_features": 2, "out_features": 3}),
        ("Net.of", {"width": 3}),
        ("narrow", {}),
        ("unannotated", {"out_features": 3}),
        ("typed", {"width": 3}),
    ],
)
def test_what_makes_one_is(factory: str, kwargs: dict[str, Any]) -> None:
    assert isinstance(build_network(Model(factory=f"test_hostile_runs:{factory}", kwargs=kwargs)), nn.Linear)


# interpolations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["${oc.env:SECRET}", "http://x/${oc.env:SECRET}", "${oc.decode:${oc.env:SECRET}}", "\\\\${oc.env:SECRET}"]
)
def test_a_config_reads_no_environment(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "a.yaml"
    for tree in ({"tracking": {"uri": text}}, {"model": {"kwargs": {"a": [text]}}}, {"model": {"kwargs": {text: 1}}}):
        path.write_text(yaml.safe_dump({"name": "a", **tree}))
        with pytest.raises(UserError, match=r"(uri|a|kwargs)=.*calls a resolver.*write the value") as told:
            load_config(path)
        assert "hunter2" not in str(told.value)
    path.write_text("name: a")
    with pytest.raises(UserError, match=r"override 'tracking\.uri=.*calls a resolver"):
        load_config(path, [f"tracking.uri={text}"])


def test_an_interpolation_may_name_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\nseed: 3\ntracking: {experiment: 'x:${name}:${seed}', uri: '\\${oc.env:HOME}'}")
    config = load_config(path, ["dense.epochs='${seed}'"])
    assert (config.tracking.experiment, config.dense.epochs, config.tracking.uri) == ("x:a:3", 3, "${oc.env:HOME}")


# credentials ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A web server that somebody else named, and what it was sent: every Authorization header, or none."""
    sent: list[str] = []

    class Handler(Quiet):
        def do_GET(self) -> None:
            sent.append(self.headers.get("Authorization", ""))
            self.send_error(404)

        do_POST = do_GET

    with serving(Handler) as url:
        yield url, sent


@pytest.fixture
def files() -> Iterator[Callable[[Path], str]]:
    """A web server that gives the files of a folder in parts."""
    root: list[Path] = []

    class Handler(Quiet):
        def do_GET(self) -> None:
            data = (root[0] / self.path.lstrip("/")).read_bytes()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with serving(Handler) as url:

        def at(folder: Path) -> str:
            root.append(folder)
            return url

        yield at


def test_credentials_go_only_to_a_server_that_the_user_named(
    listener: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Said
) -> None:
    uri, sent = listener
    run = stranger(tmp_path, tracking={"uri": uri})
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    for main, args in (
        (cluster_main, ["sync", str(run)]),
        (cluster_main, ["run", str(run / "config.yaml")]),
        (pipeline_main, ["run", str(run / "config.yaml")]),
    ):
        text = refused(*args, main=main)
        assert uri in text
        assert "MLFLOW_TRACKING_TOKEN" in text
        assert "hunter2" not in text
    assert f"--uri {uri}" in refused("sync", str(run))
    assert sent == []
    assert "did not take the run" in refused("sync", str(run), "--uri", uri)  # it is no MLflow
    assert "Bearer hunter2" in sent
    sent.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{uri}/")
    assert "did not take the run" in refused("sync", str(run))
    assert "Bearer hunter2" in sent
    sent.clear()
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "did not take the run" in refused("sync", str(run))
    assert set(sent) == {""}


# links ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["final/notes.txt", "report.html", "shards", "rounds/01", "result.json", "loop"])
def test_a_run_whose_links_lead_out_is_refused(name: str, tmp_path: Path, refused: Said) -> None:
    outside = tmp_path / "outside"
    run = stranger(tmp_path)
    link = run / name
    if link.exists():
        link.rename(outside)
    else:
        outside.write_text("a secret")
    link.symlink_to("loop" if name == "loop" else os.path.relpath(outside, link.parent))
    for command in ("report", "sync", "bench"):
        text = refused(command, str(run))
        assert str(link) in text
    assert not (tmp_path / "theirs/mlflow.db").exists()


@pytest.mark.timeout(60)
def test_a_run_with_a_pipe_is_refused(tmp_path: Path, refused: Said) -> None:
    run = stranger(tmp_path)
    os.mkfifo(run / "final/pipe")
    assert "neither a file nor a folder" in refused("report", str(run))


def test_links_within_a_run_are_followed(tmp_path: Path, secateur: Said) -> None:
    run = stranger(tmp_path)
    (run / "final/again.json").symlink_to("../result.json")
    (tmp_path / "elsewhere").symlink_to(run)
    assert secateur("report", str(tmp_path / "elsewhere")).strip().endswith("report.html")
    assert json.loads((run / "final/again.json").read_text())["name"] == "lenet"


def test_a_branch_takes_nothing_from_a_run_whose_links_lead_out(tmp_path: Path, refused: Said) -> None:
    run = stranger(tmp_path)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree |= {"name": "mine", "runs_dir": str(tmp_path / "runs"), "start": {"from": f"{run}:0"}}
    tree["data"] |= {"source": "digits", "size": 28, "lanes": 8}
    (run / "config.yaml").write_text(yaml.safe_dump({**tree, "name": "lenet", "start": {}}))
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(tree))
    (run / "dense/checkpoint").symlink_to("/etc")
    assert f"{run}/dense/checkpoint' leads out of its folder, to '/etc'" in refused("plan", str(mine))
