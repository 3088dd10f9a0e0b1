"""Every command, config and program in README.md and docs/ is run, page by page; of those that are marked as not run,
options and settings are read. Ray's place is taken by the engine without Ray.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import webdataset
import yaml
from blocks import PAGES, Block, Command, blocks, commands, inline, matches
from PIL import Image
from safetensors.torch import save_file
from support import ROOT
from support import program as process
from tiny_run import ALONE, TINY

import secateur
from cluster import actions
from cluster.cli import app as with_ray
from pipeline.__main__ import app as without_ray
from pipeline.local import LocalEngine
from pipeline.paper import reproduce
from pipeline.rounds import idle, preflight
from pipeline.settings.config import Config, load_config
from pipeline.train.world import configured

# Each costs what its reason says. What is added here must need it.
NOT_RUN = Counter(
    {
        "installs packages": 1,
        "takes minutes": 1,
        "needs a cluster": 3,
        "needs S3": 1,
        "needs ImageNet and GPUs": 1,
        "needs Imagenette and trained weights": 1,
        "needs MNIST, takes 10 to 30 minutes": 1,
        "needs MNIST, takes minutes": 1,
        "needs MNIST, takes hours": 1,
        "takes two and a half hours": 1,
        "starts two processes": 1,
        "serves until Ctrl-C": 1,
        "depends on the speed of the machine": 1,
    }
)
FILES = (".packed", ".onnx", ".safetensors", ".json")  # some have names like settings
MODULE = """
from torch import nn

def build(classes=3, width=8):
    network = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten())
    network.add_module("head", nn.Linear(width * 100, classes))
    return network
"""
OWN = {
    **TINY,
    "name": "my-network",
    "scan": {"levels": [0.5, 0.1]},
    "prune": {},
    "retrain": {**TINY["retrain"], "epochs": 1},
}
# Given to runs: on MLflow's page the default, on the others not, since it takes longer than the run itself.
TRACKED, UNTRACKED = "tracking.enabled=true", "tracking.enabled=false"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page's commands run: my-network.yaml, my_module.py, and below data/ what the pages call /data/."""
    (tmp_path / "my-network.yaml").write_text(yaml.safe_dump(OWN))
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(actions, "RayEngine", lambda: LocalEngine(ALONE))
    monkeypatch.setattr(secateur, "prune", partial(secateur.prune, tracking={"enabled": False}))
    with configured(1):
        yield tmp_path
    sys.modules.pop("my_module", None)


def make_data(folder: Path) -> None:
    """Flowers, shards of somebody else's, a checkpoint."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 12)):
        for label, name in enumerate(("daisy", "rose", "tulip")):
            place = folder / "flowers" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 128, (12, 12, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(place / f"{index}.png")
    foreign = folder / "foreign-shards"
    foreign.mkdir()
    for split in ("train", "test"):
        with webdataset.ShardWriter(str(foreign / f"{split}-%03d.tar"), verbose=0) as writer:
            for index, file in enumerate(sorted((folder / "flowers" / split).rglob("*.png"))):
                label = ("daisy", "rose", "tulip").index(file.parent.name)
                writer.write({"__key__": f"{index:04d}", "png": file.read_bytes(), "cls": label})
    names: dict[str, Any] = {}
    exec(MODULE, names)
    save_file(names["build"]().state_dict(), folder / "my_network.safetensors")


def here(text: str, folder: Path) -> str:
    """The text with /data/ where the test has it."""
    return text.replace("/data/", f"{folder}/data/")


def names_of(folder: Path) -> dict[str, Any]:
    """What a program in the pages has at hand: a network, data sets, an optimizer."""
    generator = np.random.default_rng(0)

    def images(count: int) -> list[tuple[Any, int]]:
        return [(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8), index % 3) for index in range(count)]

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 24), torch.nn.ReLU(), torch.nn.Linear(24, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return {"model": model, "train": images(256), "val": images(64), "test": images(64), "optimizer": optimizer}


def execute(command: Command, block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command in this process; it must succeed, ignore no setting, and print what the page shows."""
    program, *arguments = command.words
    if "run" in arguments:
        arguments.append(TRACKED if block.page.name == "mlflow.md" else UNTRACKED)
    if command.words[:3] == ["python", "-m", "pipeline"]:
        app, arguments = without_ray, arguments[2:]
    else:
        assert program == "secateur", f"{block.place}: '{program}' cannot be run here: mark the block as not run"
        app = with_ray
    if arguments[0] == "run" and block.page.name == "operations.md":  # `watch` waits for the end of its process
        done = process("pipeline", *arguments, ray=False, cwd=Path.cwd())
        assert done.returncode == 0, done.stderr
        return
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            app(arguments, standalone_mode=False)
        except SystemExit as ended:
            if ended.code:
                pytest.fail(f"{block.place}: {command.words}: {capsys.readouterr()}")
    printed = capsys.readouterr().out
    assert not [str(one.message) for one in said if "is ignored" in str(one.message)], (block.place, command.words)
    assert command.shown is None or matches(command.shown, printed), f"{block.place}: {command.shown}\n---\n{printed}"


def run_block(block: Block, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a block of a page, in its folder."""
    text = here(block.text, folder)
    if block.kind in ("bash", "console"):
        for command in commands(Block(block.page, block.line, block.kind, text, None)):
            execute(command, block, capsys)
    elif block.kind == "python":
        exec(compile(text, block.place, "exec"), names_of(folder))
    elif block.kind == "yaml" and text.startswith("# "):
        (folder / text.splitlines()[0][2:]).write_text(text)


RUN = [page for page in PAGES if any(block.kind and not block.reason for block in blocks(page))]
MARKED = [block for page in PAGES for block in blocks(page) if block.reason]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_a_page_does_what_it_says(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data(folder / "data")
    for block in blocks(page):
        if block.reason is None:
            run_block(block, folder, capsys)


def test_no_more_is_marked_as_not_run_than_needs_it() -> None:
    print("\n".join(f"{block.place}: {block.reason}" for block in MARKED))
    assert Counter(block.reason for block in MARKED) == NOT_RUN
    assert all(commands(block) for block in MARKED)


def ours(words: list[str]) -> tuple[Any, list[str]] | None:
    """Our program within a command, and its arguments; None where it is another one alone."""
    if words[0] == "secateur":
        return with_ray, words[1:]
    for place, (flag, module) in enumerate(pairwise(words)):
        if flag == "-m" and module in ("cluster", "pipeline"):
            return with_ray if module == "cluster" else without_ray, words[place + 2 :]
    return None


def configs(given: dict[str, Any], folder: Path) -> list[Config]:
    """The configs that a command with these arguments would run."""
    overrides = given.get("overrides") or []
    if "seeds" in given:  # of the paper
        names = ("target", "data", "seeds", "runs_dir", "networks", "configs")
        wanted = reproduce.Wanted(*(given[name] for name in names))
        return [config for job in reproduce.jobs(wanted, overrides) for config in job.runs.values()]
    if "config" not in given:
        return []
    if given["config"] in ("my-network.yaml", "flowers.yaml"):
        return [load_config(folder / "my-network.yaml", [TRACKED, *overrides])]
    return [load_config(ROOT / given["config"], overrides)]


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.place)
def test_what_is_not_run_has_options_and_settings_that_fit_together(block: Block, folder: Path) -> None:
    for command in commands(block):
        found = ours(command.words)
        if found is None:
            continue
        app, arguments = found
        command_of: Any = typer.main.get_command(app)
        context = typer.Context(command_of)
        while hasattr(command_of, "commands"):
            name, command_of, arguments = command_of.resolve_command(context, arguments)
            context = typer.Context(command_of, parent=context)
        given = command_of.make_context(name, list(arguments)).params
        for config in configs(given, folder):
            preflight.check_names(config, planned=True)
            assert list(idle.idle(config)) == [], (block.place, command.words)


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks(page) if block.kind == "yaml"],
    ids=lambda block: block.place,
)
def test_every_yaml_is_a_config_or_a_part_of_one(block: Block, folder: Path) -> None:
    tree = yaml.safe_load(block.text)
    file = folder / "part.yaml"
    file.write_text(block.text if "name" in tree else f"name: part\n{block.text}")
    assert list(idle.idle(load_config(file))) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_stands_in_a_block_that_is_read(page: Path) -> None:
    for block in blocks(page):
        assert block.kind in ("bash", "console", "yaml", "python", ""), block.place
        if not block.kind:
            first = {line.split()[0] for line in block.text.splitlines() if line.strip()}
            assert not first & {"$", "secateur", "python", "make", "ray", "torchrun", "pip"}, block.place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    schema = json.loads((ROOT / "pipeline/settings/schema.json").read_text())
    known = set(schema["properties"])
    for section, field in schema["properties"].items():
        if "$ref" in field:
            known |= {f"{section}.{name}" for name in schema["$defs"][field["$ref"].rpartition("/")[2]]["properties"]}
    for words in inline(page):
        name = words.partition("=")[0].strip()
        section, dot, rest = name.partition(".")
        if dot and section in known and not name.endswith(FILES) and rest.replace("_", "").isalpha():
            assert name in known, f"{page.name}: `{words}`"
