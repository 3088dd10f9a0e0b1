"""Configs of the repository, harmed in one place by chance, and what may come of each."""

from __future__ import annotations

import json
import math
import random
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from faults.limits import command, main
from pydantic.fields import FieldInfo
from sklearn.datasets import load_digits

from pipeline.cli import commands
from pipeline.local import LocalEngine
from pipeline.network.build import build_network
from pipeline.prune import round_plan
from pipeline.settings.base import Section
from pipeline.settings.config import Config, dump_config, load_config
from pipeline.train.world import World

ROOT = Path(__file__).resolve().parents[2]
LARGE = ("alexnet", "vgg", "resnet", "mobilenet", "squeezenet")  # names of networks that take seconds to build
SMALL_ENOUGH = 1_000_000  # parameters of a network that is trained
STEPS = 3

LINES = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *LINES])
NUMBERS = [
    "0", "-1", "-0.0", "1e-320", "1e308", "-1e308", ".nan", ".inf", "-.inf", "99999999999999999999", "1e400", "0x1F",
    "1_000", "010", "0.5", "1", "2", "3", "7", "1.5", "64", "100", "1e9", "1000000000000", "9" * 5000,
]  # fmt: skip
OTHERS = [
    "''", "'  '", "null", "~", "true", "false", "yes", "[]", "{}", "[1, 2]", "[[[]]]", "{a: 1}", "[null]", "'a\\0b'",
    "\"a\\0b\"", "\"\\ud800\"", "'\u202e\u0661\u00df'", "🦙", "2001-99-99", "2001-01-01", "!!binary aGVsbG8=",
    "!!python/object/apply:os.system ['touch MARKER']", "!!python/name:os.system", "!!set {a, b}", "!!int x",
    "!!float x", "!!bool x", "!!timestamp x", "!!null x", "&a [*a]", "*nowhere", "${seed}", "${nowhere}", "${data}",
    "${oc.env:NOWHERE}", "${oc.env:HOME}", "'\\${x}'", "???", "${", "[" * 2000, "{a: " * 500, "x" * 3000, "../../x",
    "/dev/null", "pipe:touch MARKER", "file:///etc|touch MARKER", "http://127.0.0.1:9/x", "s3://", "os", "..x", "a:b",
    ":", "small:network", "math.sqrt", "torch.nn.Linear", "torchvision.models.squeezenet1_1", "lenet_5",
    "lenet_300_100", "digits", "idx", "shards", "cosine", "step", "inv", "one-shot", "cubic", "list", "pooled",
    "uniform", "erk", "explicit", "budget", "flops", "random", "thresholds", "no-loss", "adaptive", "[shift, flip]",
    "[crop]", "[resized-crop]", "[shift, crop, resized-crop, flip]", "[0.5, 0.2]", "[0.5, 0.5]", "[1.0]",
    "{fc1.weight: 0.5}",
    "{'*': 0.5}", "{'[': 0.1}", "['*.weight']", "[fc1.weight]", "{inputs: -64}", "{inputs: 1000000000000}",
    "{dropout: .nan}", "{dropout: 2}", "{inputs: '64'}", "{x: {y: [1, {z: 2}]}}", "{classes: 3}", "other:1",
]  # fmt: skip
SNIPPETS = [
    BOMB, "<<: *nowhere", "<<: {seed: 5}", "base: &b {seed: 5}\n<<: *b", "? [a, b]\n: c", "---\nname: two",
    "%YAML 9.9", "\tname: tabbed", "name: a\nname: b", "seed: 1\nseed: 2", "\ufeffseed: 1", "seed: |\n  1", "- list",
    "{", "}", "'", "# only", "...", "1: 2", "null: 1", "? a", "true: 1",
    "seed: !!python/object/apply:os.system ['touch MARKER']",
]  # fmt: skip
OVERRIDES = [
    "=", "x", "=1", "a=", ".=1", "..=1", "a..b=1", "data.=1", ".data=1", "data=5", "data=[]", "data.root.x=1",
    "data[0]=1", "scan.levels[0]=0.5", "scan.levels.0=0.5", "seed==1", "seed=1=2", "seed=", "seed=[", "seed={",
    "seed=${", "seed=a: b: c", "seed=!!python/object/apply:os.system ['touch MARKER']", "a" + ".a" * 5000 + "=1",
    "seed=" + "[" * 5000, "seed=\t1", "sed=1", "SEED=1", "seed =1", "seed= 1", "name=\ud800", "name=a\nb",
    "seed=&a 1", "seed=*a", "seed=" + BOMB,
]  # fmt: skip


def tiny_data(folder: Path) -> Path:
    """scikit-learn's digits in the middle of 28x28 pixels, as the four files of MNIST: 400 train, 100 test."""
    found = load_digits()
    images = np.zeros((500, 28, 28), np.uint8)
    images[:, 10:18, 10:18] = np.round(found.images[:500] * 255 / 16)
    for name, part in (("train", slice(0, 400)), ("t10k", slice(400, 500))):
        pixels, labels = images[part], found.target[part].astype(np.uint8)
        header = bytes([0, 0, 8, 3]) + struct.pack(">III", len(pixels), 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + struct.pack(">I", len(labels)) + labels.tobytes()
        )
    return folder


def bases(data: Path) -> dict[str, dict[str, Any]]:
    """Every config of the repository by name, its idx files being those of `data`, without MLflow."""
    found = {}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        tree = yaml.safe_load(path.read_text())
        if tree["data"]["source"] == "idx":
            tree["data"]["root"] = str(data)
        elif tree["data"]["source"] == "folder":
            tree["data"]["source"] = "imagenet"  # a plan needs no files of it
        found[f"{path.parent.name}/{path.stem}"] = {**tree, "tracking": {"enabled": False}}
    return found


def fields(section: type[Section]) -> dict[str, FieldInfo]:
    """The settings of a section as they are written."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every setting by its dotted name."""
    found = []
    for name, field in fields(section).items():
        kind = field.annotation
        found.append(prefix + name)
        if isinstance(kind, type) and issubclass(kind, Section):
            found += keys(kind, f"{prefix}{name}.")
    return found


def placed(tree: dict[str, Any], key: str, mark: str) -> str:
    """The tree as YAML, with the value of a setting given as YAML."""
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = "PLACE"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).replace("PLACE", mark, 1)


PLAUSIBLE = {
    "int": ["0", "1", "2", "3", "7", "8", "16", "40", "64", "100", "1000", "1000000000"],
    "float": ["0", "0.001", "0.01", "0.1", "0.5", "0.9", "1", "2", "5", "50", "1e6", "1e30", "1e300", "1e-300"],
    "bool": ["true", "false"],
}


def plausible(chance: random.Random, key: str) -> str:
    """A value of the type of a setting: a wrong one may still be accepted, and must not be ignored."""
    section: type[Section] = Config
    *parents, leaf = key.split(".")
    for parent in parents:
        section = fields(section)[parent].annotation  # type: ignore[assignment]
    text = str(fields(section)[leaf].annotation)
    options = re.findall(r"'([^']+)'", text) if "Literal" in text else []
    for kind, values in PLAUSIBLE.items():
        options += values if kind in text else []
    value = chance.choice(options or OTHERS)
    return f"[{value}]" if "tuple" in text else value


def mutant(chance: random.Random, tree: dict[str, Any]) -> tuple[bytes, list[str], str]:
    """A config's bytes, overrides, and the setting that was harmed (or how, where it is no single one)."""
    kinds = ["plausible"] * 9 + ["value"] * 5 + ["override"] * 3
    kind = chance.choice([*kinds, "delete", "rename", "twice", "snippet", "bytes", "cut", "odd"])
    plain = yaml.safe_dump(tree, sort_keys=False)
    lines = plain.splitlines()
    place = chance.randrange(len(lines))
    value = chance.choice(NUMBERS if chance.random() < 0.55 else OTHERS)
    key = chance.choice(keys())
    if kind == "plausible":
        chosen = chance.sample([key for key in keys() if "cluster" not in key], chance.randrange(1, 4))
        overrides = [f"{key}={plausible(chance, key)}" for key in chosen]
        return plain.encode(), overrides, " ".join(overrides)
    if kind == "value":
        return placed(tree, key, value).encode(errors="surrogatepass"), [], f"{key}={value}"
    if kind == "override":
        return plain.encode(), [f"{key}={value}"], f"{key}={value}"
    if kind == "odd":
        override = chance.choice(OVERRIDES)
        return plain.encode(), [override], f"override {override[:60]}"
    if kind == "delete":
        del lines[place]
    elif kind == "rename":
        lines[place] = lines[place].replace(":", "x:", 1)
    elif kind == "twice":
        lines.insert(chance.randrange(len(lines)), lines[place])
    elif kind == "snippet":
        lines.insert(chance.choice([0, len(lines)]), chance.choice(SNIPPETS))
    data = bytearray("\n".join(lines).encode(errors="surrogatepass"))
    if kind == "cut":
        data = data[: chance.randrange(len(data))]
    if kind == "bytes":
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data), [], f"{kind}, line {place}"


def judge(seed: int, case: int, here: Path) -> str:
    """`refused` by one message, `planned`, `stopped` in a tiny run by one message, or `ran`; raises for all else."""
    chance = random.Random(f"{seed}/{case}")
    data = here.parent / "data"
    every = bases(data)
    names = [name for name in every if chance.random() < 0.1 or not name.split("/")[1].startswith(LARGE)]
    text, overrides, what = mutant(chance, every[chance.choice(names)])
    (here / "c.yaml").write_bytes(text)
    try:
        return outcome(here, overrides, what)
    except Exception as error:
        error.add_note(what[:200])
        raise
    finally:
        assert not [*here.rglob("MARKER"), *here.parent.glob("MARKER")], f"something was run: {what[:200]}"


def outcome(here: Path, overrides: list[str], what: str) -> str:
    made: dict[str, Any] = {}
    message = command(lambda: made.update(config=commands.load(here / "c.yaml", overrides, needs_data=False)))
    if message is not None:
        settings_named = re.findall(r"([a-z0-9_]+)=", what)
        named = any(name in message for name in settings_named) or not settings_named
        assert named or "YAML" in message or "cannot be read" in message, message
        return "refused"
    config: Config = made["config"]
    (here / "again.yaml").write_text(dump_config(config))
    assert load_config(here / "again.yaml") == config, "dump and load"
    if command(lambda: commands.show(config, full=True, as_json=False)) is not None:
        return "refused by the plan"
    if not small(config):
        return "planned"
    if command(lambda: commands.run(bounded(config, here), LocalEngine(World(0, 1, torch.device("cpu"))))) is not None:
        return "stopped"
    check(bounded(config, here), here / "runs" / config.name)
    return "ran"


def small(config: Config) -> bool:
    """Whether a run of a few steps of it takes a moment."""
    if config.data.source not in ("digits", "idx") or config.tracking.enabled or config.threads > 2:
        return False
    network = build_network(config.model, 10, 0)
    levels = len(config.scan.levels) * (1 if config.scan.mode == "grid" else 3)
    return sum(p.numel() for p in network.parameters()) < SMALL_ENOUGH and levels < 60 and config.prune.rounds < 6


def bounded(config: Config, here: Path) -> Config:
    """The config with few updates, and a folder of its own."""

    def few(train: Any) -> Any:
        return train.model_copy(update={"steps": min(STEPS, train.steps or STEPS)})

    scan = config.scan.model_copy(update={"samples": min(40, config.scan.samples or 40)})
    parts = {"dense": few(config.dense), "retrain": few(config.retrain), "scan": scan, "runs_dir": str(here / "runs")}
    return config.model_copy(update=parts)


def check(config: Config, run: Path) -> None:
    """AssertionError where result.json is not what the config asks for."""

    def no_number(text: str) -> None:
        raise AssertionError(f"{text} in a result")

    for path in run.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=no_number)
    result = json.loads((run / "result.json").read_text())
    accepted = [row["density"] for row in result["rounds"] if row["accepted"]]
    assert (result["name"], result["seed"], result["network"]) == (config.name, config.seed, config.model.factory)
    assert (result["test"]["dense_control"] is None) == (not (config.prune.dense_control and accepted))
    total, kept = result["weights_total"], result["weights_kept"]
    assert kept == sum(layer["kept"] for layer in result["layers"]) > 0
    assert load_config(run / "config.yaml") == config
    if config.target.mode == "no-loss":
        assert accepted == sorted(accepted, reverse=True)
        assert result["density"] == ([1.0, *accepted])[-1]
        return
    plan = round_plan.densities(config.prune, config.target)
    assert len(result["rounds"]) == len(plan)
    last = json.loads((run / f"rounds/{len(plan):02d}/plan.json").read_text())
    assert kept == sum(tensor["keep"] for tensor in last["tensors"])
    epochs = config.retrain.epochs
    steps = json.loads((run / f"rounds/{len(plan):02d}/metrics.json").read_text())["steps"]
    assert steps <= STEPS
    assert (steps == 0) == (epochs == 0)
    counted = (config.target.mode, config.target.budget) == ("compression", "weights")
    if counted and config.prune.allocation != "explicit":
        budget = round_plan.budget(config.prune, config.target, len(plan), total)
        assert kept <= budget if config.prune.dead_neurons else kept == budget
        wanted = plan[-1] if config.prune.schedule == "list" else 1 / config.target.compression
        assert kept / total <= wanted
        assert math.isclose(result["compression"], total / kept)
    if config.prune.allocation == "explicit" and config.target.mode == "compression":
        expected = round_plan.explicit_densities(config.prune, config.target, plan[-1])
        for layer in result["layers"]:
            if layer["name"] in expected and not config.prune.dead_neurons:
                assert abs(layer["kept"] - expected[layer["name"]] * layer["weights"]) <= max(
                    1, config.prune.min_weights
                )


if __name__ == "__main__":
    main(judge)
