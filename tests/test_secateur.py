"""secateur from Python: networks and data sets given as objects, and what is handed back."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import secateur
from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.cli.called import Call
from pipeline.data import given, loader, shards
from pipeline.data import given as data_given
from pipeline.data.shards import load_manifest
from pipeline.run.events import Event, StageBegun, unheard
from pipeline.settings.config import Config
from pipeline.settings.data import Data

SETTINGS: dict[str, Any] = {
    "data": {"mean": [0.3], "std": [0.38]},
    "dense": {"epochs": 2, "batch_size": 64, "lr": 0.05},
    "retrain": {"epochs": 1, "batch_size": 64, "lr": 0.02},
    "prune": {"allocation": "uniform", "rounds": 1},
    "tracking": {"enabled": False},
    "progress": False,
}


@cache
def pixels() -> tuple[np.ndarray[Any, Any], list[int]]:
    """scikit-learn's digits: uint8 (1797, 8, 8), and labels."""
    digits = load_digits()
    return np.round(digits.images * 255 / 16).astype(np.uint8), [int(label) for label in digits.target]


class Digits(Dataset[tuple[Any, int]]):
    """Some of the digits as arrays."""

    def __init__(self, first: int, last: int) -> None:
        images, labels = pixels()
        self.images, self.labels = images[first:last], labels[first:last]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.images[number], self.labels[number]


SETS = (Digits(0, 1000), Digits(1000, 1300), Digits(1300, 1797))


def stages(events: list[Event], skipped: bool = False) -> list[str]:
    return [event.stage for event in events if isinstance(event, StageBegun) and event.skipped == skipped]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    return small.network(dropout=0.1)


@pytest.fixture(scope="module")
def pruned(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> secateur.Pruned:
    """A small network of the user's own, pruned 4 times on data sets of the user's own."""
    runs = tmp_path_factory.mktemp("own") / "runs"
    return secateur.prune(network, *SETS, compression=4, runs_dir=str(runs), **SETTINGS)


def test_a_network_is_pruned_on_data_sets_and_judged(pruned: secateur.Pruned) -> None:
    assert pruned.verdict == pruned.result.verdict
    assert pruned.verdict in ("no loss", "undecided", "loss")
    assert round(pruned.compression, 2) == 4.0
    assert pruned.result.test.samples == 497
    assert pruned.result.test.dense.top1 > 0.5
    kept = sum(int(mask.sum()) for mask in pruned.masks.values())
    assert kept == pruned.result.weights_kept
    assert pruned.table.columns[0] == "tensor"
    assert [row[0] for row in pruned.table.rows] == [*pruned.masks]
    assert "layers" in pruned.figures  # those of one round would show little, and are left out
    page = pruned._repr_html_()
    assert "<svg" in page
    assert "verdict" in page
    assert str(pruned).startswith("verdict")
    facts = json.loads((Path(pruned.path) / "data.json").read_text())
    assert (facts["train"], facts["val"], facts["test"], facts["classes"]) == (1000, 300, 497, 10)


def test_what_is_loaded_gives_the_answers_of_the_masked_network(pruned: secateur.Pruned, network: nn.Module) -> None:
    images = torch.randn(16, 1, 8, 8)
    loaded = secateur.load(pruned.path, network)
    assert not loaded.training
    assert torch.allclose(loaded(images), pruned.masked(images), atol=1e-5)
    assert torch.equal(loaded(images), pruned.model(images))
    masks = secateur.masks_of(pruned.path)
    assert all(torch.equal(masks[name], pruned.masks[name]) for name in pruned.masks)
    assert all(not bool(pruned.masked.get_parameter(name)[~mask].any()) for name, mask in masks.items())


def test_what_is_loaded_has_the_reports_accuracy(pruned: secateur.Pruned) -> None:
    images = torch.from_numpy(SETS[2].images).float().unsqueeze(1) / 255
    with torch.no_grad():
        right = pruned.model((images - 0.3) / 0.38).argmax(1) == torch.tensor(SETS[2].labels)
    assert float(right.float().mean()) == pytest.approx(pruned.result.test.pruned.top1)


class WithFeatures(nn.Module):
    """A small network that gives its logits and their softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small.network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.inner(x)
        return logits, logits.softmax(1)


def test_a_network_of_several_outputs_comes_back_as_one_of_logits(tmp_path: Path) -> None:
    network, images = WithFeatures().eval(), torch.randn(4, 1, 8, 8)
    made = secateur.prune(network, *SETS, compression=2, runs_dir=str(tmp_path / "runs"), **SETTINGS)
    wanted = made.masked(images)
    assert wanted.shape == (4, 10)
    assert torch.allclose(made.model(images), wanted, atol=1e-5)
    assert torch.equal(secateur.load(made, network)(images), made.model(images))
    assert isinstance(network(images), tuple)


def test_nothing_of_the_users_is_changed(tmp_path: Path) -> None:
    model = small.network()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    torch.set_num_threads(2)
    torch.set_deterministic_debug_mode(0)  # an earlier test of this process may have set another
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    more = {**SETTINGS, "dense": {"epochs": 1, "batch_size": 64}}
    secateur.prune(model, *SETS, runs_dir=str(tmp_path), **more)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == 2
    assert torch.get_deterministic_debug_mode() == 0
    torch.set_num_threads(1)
    assert not model.training
    assert not model._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_call_goes_on_and_another_begins_another_run(pruned: secateur.Pruned, network: nn.Module) -> None:
    runs = str(Path(pruned.path).parent)
    events: list[Event] = []
    more = {**SETTINGS, "progress": events.append}
    again = secateur.prune(network, *SETS, compression=4, runs_dir=runs, **more)
    assert again.path == pruned.path
    assert stages(events) == []
    assert stages(events, skipped=True) == ["shards", "dense", "rounds", "final"]
    assert secateur.plan(network, *SETS, compression=4, runs_dir=runs, **SETTINGS).notes
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.get_parameter("fc2.bias")[0] += 1
    events.clear()
    changed = {**more, "dense": {**SETTINGS["dense"], "epochs": 1}}
    another = secateur.prune(other, *SETS, compression=4, runs_dir=runs, **changed)
    assert another.path != pruned.path
    assert stages(events) == ["shards", "dense", "rounds", "final"]
    assert len(list(Path(runs, given.FOLDER).iterdir())) == 1  # the data are the same


def test_a_network_is_taken_as_it_is_by_default(network: nn.Module, tmp_path: Path) -> None:
    more = {**SETTINGS, "dense": {"batch_size": 64}, "retrain": {"epochs": 0}}
    made = secateur.prune(network, *SETS, compression=1, runs_dir=str(tmp_path), **more)
    state = made.masked.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_masks_are_held_while_the_user_trains_on(pruned: secateur.Pruned) -> None:
    model, masks = copy.deepcopy(pruned.masked).train(), pruned.masks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    secateur.hold(model, masks, optimizer)
    for images, labels in DataLoader(Floats(SETS[0]), batch_size=100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())
    images = torch.randn(8, 1, 8, 8)
    smaller = secateur.compact(model, images)
    assert torch.allclose(smaller(images), model.eval()(images), atol=1e-5)


def test_a_network_is_made_compact_by_masks_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[:, 1:3] = False
    before = model[2].weight.detach().clone()
    inputs = torch.randn(5, 3)
    small_one = secateur.compact(model, inputs, {"2.weight": mask})
    assert tuple(small_one[0].weight.shape) == (2, 3)  # type: ignore[index]
    assert torch.equal(model[2].weight, before)
    expected = torch.relu(model[0](inputs)) @ (before * mask).T + model[2].bias
    assert torch.allclose(small_one(inputs), expected, atol=1e-6)


def test_a_scan_and_a_plan_need_no_run_before_them(network: nn.Module, tmp_path: Path) -> None:
    more = {**SETTINGS, "runs_dir": str(tmp_path), "scan": {"levels": [0.5, 0.1]}}
    planned = secateur.plan(network, *SETS, compression=4, **more)
    assert [tensor.name for tensor in planned.prunable] == ["conv1.weight", "fc1.weight", "fc2.weight"]
    assert planned.counts.test == 497
    found = secateur.scan(network, *SETS, **more)
    assert [tensor.name for tensor in found.scan.tensors] == ["conv1.weight", "fc1.weight", "fc2.weight"]
    assert "<svg" in found._repr_html_()


class Floats(Dataset[Any]):
    """As torchvision's ToTensor gives them: float (1, H, W) in 0..1, and labels as tensors."""

    def __init__(self, of: Digits) -> None:
        self.of = of

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, label = self.of[number]
        return torch.from_numpy(image).unsqueeze(0).float() / 255, torch.tensor(label)


class Pictures(IterableDataset[Any]):
    """An iterable of mappings, as Hugging Face's data sets give them."""

    def __init__(self, of: Digits) -> None:
        self.of = of

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for image, label in zip(self.of.images, self.of.labels, strict=True):
            yield {"image": Image.fromarray(image), "label": label}


def written(sets: dict[str, Any], root: Path, **data: Any) -> given.Written:
    return given.write(sets, str(root), Data.model_validate(data), 0, lambda text, done, total: None)


def test_the_form_of_a_data_set_does_not_matter(tmp_path: Path) -> None:
    digits = {"train": Digits(0, 100), "test": Digits(100, 150)}
    made = written({**digits, "val": None}, tmp_path)
    assert (made.channels, made.size) == (1, 8)
    forms = [
        {"train": Floats(digits["train"]), "test": Pictures(digits["test"])},
        {
            "train": TensorDataset(torch.from_numpy(digits["train"].images), torch.tensor(digits["train"].labels)),
            "test": [(image[:, :, None], np.int64(label)) for image, label in digits["test"]],
        },
    ]
    for form in forms:
        assert written(form, tmp_path) == made
    sizes = load_manifest(made.root).sizes
    assert sizes == {"train": 90, "val": 10, "test": 50}
    assert written({"train": digits["train"]}, tmp_path).root != made.root


def test_sets_that_are_left_out_are_held_out_of_train(tmp_path: Path) -> None:
    made = written({"train": Digits(0, 100)}, tmp_path, val_fraction=0.25, test_fraction=0.2)
    assert load_manifest(made.root).sizes == {"train": 60, "val": 20, "test": 20}


def called(train: Any, folder: Path, **data: Any) -> Config:
    """The config that a call with a data set makes."""
    settings = {"runs_dir": str(folder), "data": data}
    call = Call(model="torchvision.models.resnet18", sets={"train": train}, settings=settings)
    with call.opened(unheard, needs_data=False) as config:
        return config


def test_colours_and_sizes_are_told_by_the_images(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    square = [(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8), i % 2) for i in range(40)]
    made = written({"train": square}, tmp_path)
    assert (made.channels, made.size) == (3, 9)
    config = called(square, tmp_path, mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2])
    assert (config.data.channels, config.data.mean) == (3, (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="mean and std take 1 or 3 numbers"):
        called(square, tmp_path, mean=[0.5, 0.5])
    mixed = [(Image.new("RGB", (8 + i % 3, 8)), i % 2) for i in range(40)]
    assert written({"train": mixed}, tmp_path).size is None


class Restless(Digits):
    def __getitem__(self, number: int) -> tuple[Any, int]:
        image, label = super().__getitem__(number)
        return image ^ np.random.default_rng().integers(0, 2, image.shape, dtype=np.uint8), label


ONE = np.zeros((4, 4), np.uint8)
BAD_SETS: dict[str, tuple[Any, str]] = {
    "no data set": (7, "train is a int, not a data set"),
    "empty": ([], "train is empty"),
    "random": (Restless(0, 20), r"sample 0 of train is another image each time .* data\.augment"),
    "a loader": (iter(DataLoader(Floats(Digits(0, 20)), batch_size=4)), r"sample 0 of train: .* not its DataLoader"),
    "no pair": ([ONE], "sample 0 of train is a ndarray: give pairs"),
    "a label in words": ([(ONE, "cat")], "its label is a str, not the number of a class"),
    "a negative label": ([(ONE, -1)], "its label is -1; labels count classes from 0"),
    "normalised": ([(torch.randn(1, 4, 4), 0)], r"leave a normalisation out .* data\.mean"),
    "not a number": ([(torch.full((1, 4, 4), float("nan")), 0)], "has values from nan to nan"),
    "four channels": ([(torch.zeros(4, 4, 4), 0)], r"has the shape \(4, 4, 4\): give \(C, H, W\)"),
    "whole numbers": ([(np.zeros((4, 4), np.int32), 0)], "its image is of int32: give uint8"),
    "text": ([("cat.jpg", 0)], "its image is a str: give a PIL image"),
    "too few classes": ([(ONE, 5)] * 20, "data.classes=2, and the data sets hold the label 5"),
}


@pytest.mark.parametrize("kind", BAD_SETS)
def test_a_data_set_that_is_none_is_one_sentence(kind: str, tmp_path: Path) -> None:
    bad, said = BAD_SETS[kind]
    with pytest.raises(UserError, match=said):
        written({"train": bad}, tmp_path, **({"classes": 2} if "classes" in kind else {}))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"model": None}, "model is missing"),
    "no data": (dict.fromkeys(("train", "val", "test")), "train is missing: give a data set"),
    "data twice": ({"data": {"source": "folder", "root": "/x"}}, "data has root, source, and train is given too"),
    "a target that is a number": ({"compression": 5, "target": 3}, "target=3: give a mapping"),
    "compression twice": ({"compression": 5, "target": {"compression": 7}}, "are one setting: leave one of them out"),
    "half precision": ({"model": small.network().half()}, r"model is of torch\.float16, .*give model\.float\(\)"),
    "a compiled network": ({"model": torch.compile(small.network())}, r"compiled by torch\.compile.*model\._orig_mod"),
    "no network": ({"model": 3}, "model is 3, which has no import path"),
    "a lambda": ({"model": lambda: None}, "which has no import path"),
    "an unknown group": ({"retain": {"epochs": 1}}, "unknown setting 'retain'; did you mean 'retrain'"),
    "an unknown setting": (
        {"retrain": {"epoch": 1}},
        r"unknown setting 'retrain\.epoch'; did you mean 'retrain\.epochs'",
    ),
    "an unknown engine": ({"engine": "dask"}, "engine='dask' is unknown"),
    "an object on a cluster": (
        {"engine": "ray"},
        r"a cluster's workers cannot build: give a function .* model='my_module:build'",
    ),
    "shards and sets": ({"train": "/shards"}, "train='/shards' is a folder of shards"),
    "no train": ({"train": None}, "train is missing"),
    "weights of the object": ({"model_settings": {"checkpoint": "x"}}, "model_settings has checkpoint"),
    "images that differ": (
        {"train": [(Image.new("L", (8 + i % 2, 8)), i % 2) for i in range(40)]},
        r"data\.size is missing",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence(kind: str, network: nn.Module, tmp_path: Path) -> None:
    changes, said = MISTAKES[kind]
    call = {"model": network, "train": SETS[0], "val": SETS[1], "test": SETS[2], "runs_dir": str(tmp_path), **SETTINGS}
    with pytest.raises(UserError, match=said):
        secateur.prune(**{**call, **changes})
    assert not (tmp_path / "runs").exists()


def test_a_network_that_was_an_object_is_asked_for(pruned: secateur.Pruned) -> None:
    with pytest.raises(UserError, match=r"was given as a Python object .* give it again as model="):
        secateur.load(pruned.path)
    with pytest.raises(UserError, match="does not fit the network"):
        secateur.load(pruned.path, nn.Linear(3, 2))


def test_a_run_of_a_config_is_pruned_and_loaded_by_python(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nmodel: {factory: 'small:network'}\ndata: {source: digits, size: 8}\n")
    more = {**SETTINGS, "runs_dir": str(tmp_path / "runs")}
    made = secateur.prune(config=file, compression=3, **more)
    assert Path(made.path) == tmp_path / "runs/mine"
    with pytest.raises(UserError, match="--trust-code"):
        secateur.load(made.path)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(secateur.load(made.path, trust_code=True)(images), made.model(images))
    by_function = secateur.prune(
        small.network,
        data={"source": "digits", "size": 8},
        **{key: value for key, value in more.items() if key != "data"},
    )
    assert by_function.result.network == "small:network"


def test_mistakes_after_a_run_are_one_sentence(pruned: secateur.Pruned, network: nn.Module) -> None:
    assert torch.equal(secateur.load(pruned, network)(torch.ones(1, 1, 8, 8)), pruned.model(torch.ones(1, 1, 8, 8)))
    assert secateur.masks_of(pruned).keys() == pruned.masks.keys()
    with pytest.raises(UserError, match="repeats=0: give at least 5"):
        pruned.bench(repeats=0)
    with pytest.raises(UserError, match=r"does not take an input of shape \(1, 3, 8, 8\)"):
        secateur.compact(network, torch.ones(1, 3, 8, 8))
    with pytest.raises(UserError, match="example is a tuple"):
        secateur.compact(network, (1, 1, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model is a str"):
        secateur.compact(pruned.path, torch.ones(1, 1, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="masks is a str"):
        secateur.hold(network, pruned.path, torch.optim.SGD(network.parameters()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="optimizer is a NoneType"):
        secateur.hold(network, pruned.masks, None)  # type: ignore[arg-type]


def test_images_of_16_bits_are_read_as_those_of_a_folder(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    samples = [(Image.fromarray(values), number % 2) for number in range(40)]
    written = data_given.write(
        {"train": samples, "val": samples, "test": samples}, str(tmp_path), Data(), 0, lambda *_: None
    )
    assert (written.channels, written.size) == (1, 8)
    config = Data(source="shards", root=written.root, size=8)
    split = loader.open_split(config, written.root, shards.load_manifest(written.root), "val")
    batch = next(loader.EvalLoader(split, config).batches(0, 1))
    assert batch.images[0, 0].tolist() == (values >> 8).tolist()


def test_a_refused_call_locks_no_name(network: nn.Module, tmp_path: Path) -> None:
    call = {"runs_dir": str(tmp_path), "name": "mine", **SETTINGS}
    with pytest.raises(UserError, match="compression"):
        secateur.prune(network, *SETS, compression=1e9, **call)
    assert secateur.prune(network, *SETS, compression=3, **call).compression == pytest.approx(3.0, rel=0.01)


def test_bench_writes_what_others_load(pruned: secateur.Pruned) -> None:
    found = pruned.bench(repeats=5)
    assert not found.missing
    images = torch.randn(4, 1, 8, 8)
    program = torch.export.load(Path(pruned.path) / "final/compact.pt2").module()
    assert torch.allclose(program(images), pruned.model(images), atol=1e-5)
    assert "compact.pt2" in (Path(pruned.path) / "final/README.md").read_text()


def test_it_needs_no_ray(tmp_path: Path) -> None:
    script = "import sys, secateur; assert not any(name.split('.')[0] in ('ray', 'mlflow') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(secateur.__file__).parent)


def test_under_torchrun_the_command_is_named(network: nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="under torchrun use"):
        secateur.prune(network, *SETS, runs_dir=str(tmp_path), **SETTINGS)


def test_a_run_on_s3_is_loaded_by_its_url(pruned: secateur.Pruned, network: nn.Module, s3: str) -> None:
    for file in Path(pruned.path).rglob("*"):
        if file.is_file() and "shards" not in file.parts:
            storage.copy(str(file), storage.join(s3, "runs/mine", file.relative_to(pruned.path)))
    url = storage.join(s3, "runs/mine")
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(secateur.load(url, network)(images), pruned.model(images))
    assert secateur.masks_of(url).keys() == pruned.masks.keys()


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_prunes_what_its_workers_can_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(small.__file__).parent))  # of the workers
    inside = import_module("ray._private.worker")
    monkeypatch.setattr(inside, "print_to_stdstream", inside.print_to_stdstream)  # as it was, after this test
    more = {**SETTINGS, "dense": {"epochs": 1, "batch_size": 64}, "runs_dir": str(tmp_path)}
    local, ray = (
        secateur.prune(small.network, *SETS, compression=4, engine=engine, name=engine, **more)  # type: ignore[arg-type]
        for engine in ("local", "ray")
    )
    state = ray.masked.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in local.masked.state_dict().items())
