"""Files of weights: read by content, under any of the usual keys and prefixes, or refused with what does not fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.base.errors import UserError
from pipeline.network.paper_networks import lenet_5
from pipeline.network.weights import load_weights, stored_once


class Tied(nn.Module):
    """Two layers of one weight tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight


@pytest.mark.parametrize("suffix", [".pth", ".th", ".ckpt", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "_orig_mod.", "module._orig_mod."])
def test_weights_come_back(tmp_path: Path, suffix: str, prefix: str) -> None:
    source, target, path = lenet_5(), lenet_5(), tmp_path / f"w{suffix}"
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path)
    load_weights(target, path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_older_than_the_counters_of_norms_may_have_a_prefix(tmp_path: Path, prefix: str) -> None:
    source, target = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
    state = {prefix + name: tensor for name, tensor in source.state_dict().items() if "tracked" not in name}
    torch.save(state, tmp_path / "old.pth")
    load_weights(target, tmp_path / "old.pth")
    assert torch.equal(target[0].weight, source[0].weight)


def test_every_mismatch_is_listed(tmp_path: Path) -> None:
    state = lenet_5().state_dict()
    state["fc9.weight"] = state.pop("fc2.weight")
    state["fc1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        load_weights(lenet_5(), tmp_path / "w.pth")
    text = str(caught.value)
    assert "missing: fc2.weight;" in text
    assert "unexpected: fc9.weight;" in text
    assert "shapes that differ: fc1.bias (3,) for (500,)" in text


def test_long_lists_are_cut(tmp_path: Path) -> None:
    torch.save({f"x{i}": torch.zeros(1) for i in range(20)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"unexpected: x0, x1, x2, x3, x4, x5, x6, x7 and 12 more"):
        load_weights(lenet_5(), tmp_path / "w.pth")


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    model = lenet_5()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = lenet_5().state_dict() | {"fc2.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(Path(os.environ["BOMB"])),))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    torch.save({"w": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="weights_only"):
        load_weights(lenet_5(), tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not tensors", b"PK\x03\x04" + bytes(40), b"\x80\x02}q"])
def test_a_damaged_file(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(lenet_5(), path)


def test_other_things_in_a_file(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({"conv1.weight": 3}, tmp_path / "number.pth")
    torch.save({}, tmp_path / "empty.pth")
    for name, message in (
        ("list.pth", "holds a list"),
        ("number.pth", "not named tensors: conv1"),
        ("empty.pth", "is empty"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(lenet_5(), tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        load_weights(lenet_5(), tmp_path / "none.pth")


def test_batch_norm_of_older_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")


def test_tied_tensors_load_from_safetensors(tmp_path: Path) -> None:
    source, target = Tied(), Tied()
    unique = dict(source.named_parameters())
    save_file({name: tensor.detach() for name, tensor in unique.items()}, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target.two.weight, source.one.weight)


def two_layers(first: str = "a", classes: int = 2) -> nn.Sequential:
    network = nn.Sequential()
    network.add_module(first, nn.Linear(3, 4))
    network.add_module("fc", nn.Linear(4, classes))
    return network


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "w.pth")
    return folder / "w.pth"


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "anything"])
def test_the_state_dict_is_found_by_what_fits(tmp_path: Path, key: str) -> None:
    """Beside it lie an optimizer's state, numbers, and another network's weights."""
    source, target = two_layers(), two_layers()
    other = {"x.weight": torch.zeros(2)}
    path = saved(tmp_path, {"epoch": 3, "optimizer": {"state": {0: {}}}, "teacher": other, key: source.state_dict()})
    load_weights(target, path)
    assert torch.equal(target.fc.weight, source.fc.weight)


def test_of_two_that_fit_one_must_be_named(tmp_path: Path) -> None:
    first, second, target = two_layers(), two_layers(), two_layers()
    path = saved(
        tmp_path, {"model": first.state_dict(), "deep": {"ema": second.state_dict()}, "ema": second.state_dict()}
    )
    with pytest.raises(
        UserError, match=r"several state dicts that fit, under model, ema: .*model.checkpoint_key=model"
    ):
        load_weights(target, path)
    for key in ("ema", "deep.ema"):
        load_weights(target, path, key)
        assert torch.equal(target.fc.weight, second.fc.weight)
    with pytest.raises(UserError, match=r"model.checkpoint_key=emma: .* has no 'emma' there, but model, deep, ema"):
        load_weights(target, path, "emma")
    with pytest.raises(UserError, match=r"model.checkpoint_key=deep: .* no state dict of tensors there"):
        load_weights(target, path, "deep")


def test_a_network_whose_own_names_begin_with_module(tmp_path: Path) -> None:
    network = nn.Module()
    network.module = two_layers()
    wanted = network.module.fc.weight.clone()
    path = saved(tmp_path, network.state_dict())
    with torch.no_grad():
        network.module.fc.weight.zero_()
    load_weights(network, path)
    assert torch.equal(network.module.fc.weight, wanted)
    bare = saved(tmp_path, {name.removeprefix("module."): value for name, value in network.state_dict().items()})
    load_weights(network, bare)  # the prefix is put before the names
    assert torch.equal(network.module.fc.weight, wanted)


def test_a_head_of_another_size_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, two_layers(classes=1000).state_dict())
    with pytest.raises(UserError, match=r"its head fc.weight is for 1000 classes, the network's for 2: .*model.kwargs"):
        load_weights(two_layers(), path)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda value: value.to(torch.int8), r"whole numbers \(torch.int8\)"),
        (lambda value: value.to(torch.complex64), "complex numbers"),
        (lambda value: value.to_sparse(), "sparse"),
        (lambda value: value.to_sparse_csr(), "sparse"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_weights_are_refused_by_name(tmp_path: Path, change: Any, kind: str) -> None:
    network = two_layers()
    state = network.state_dict()
    path = saved(tmp_path, state | {"fc.weight": change(state["fc.weight"])})
    with pytest.raises(UserError, match=rf"fc.weight is {kind}|cannot be read as tensors alone"):
        load_weights(network, path)


def test_halves_and_doubles_are_taken(tmp_path: Path) -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        source, target = two_layers(), two_layers()
        load_weights(target, saved(tmp_path, source.to(kind).state_dict()))
        assert torch.equal(target.fc.weight, source.fc.weight.float())


def test_tied_tensors_are_stored_once() -> None:
    model = Tied()
    assert stored_once(model, model.state_dict()).keys() == {"one.weight", "one.bias", "two.bias"}
