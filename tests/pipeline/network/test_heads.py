"""Heads of attention: which rows and columns are one, by hand; with fewer heads the outputs are those of masks."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from networks import FORMS, Attention
from test_groups import groups_of, members
from torch import Tensor, nn

from pipeline.export.export import save_compact
from pipeline.network.compact import compact, rebuild
from pipeline.network.groups import Groups
from pipeline.network.heads import FewerHeads, refit
from pipeline.network.shrink import shrink

WIDTH, HEADS, TOKENS = 8, 4, 5


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, with random numbers in all parameters, biases too."""
    draw = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.double))
    return model


def kept(groups: Groups, *heads: int) -> dict[str, np.ndarray]:
    """All units, and of the groups of heads these."""
    flags = {name: np.isin(np.arange(group.units), heads) for name, group in groups.by_name.items()}
    return groups.whole | {name: each for name, each in flags.items() if groups.by_name[name].units == HEADS}


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            made.get_parameter(name).mul_(mask)
    return made


class Torchs(nn.Module):
    """Torch's module, in its two orders of axes."""

    def __init__(self, batch_first: bool, bias: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, bias=bias, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        y, _ = self.attention(y, y, y)
        return y if self.batch_first else y.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_head_of_torchs_module_is_its_rows_its_columns_and_its_biases(batch_first: bool) -> None:
    model = filled(Torchs(batch_first))
    groups = groups_of(model, TOKENS, 4)
    assert members(groups) == {
        "attention.in_proj_weight": [
            ("attention.in_proj_weight", 0, [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]),
            ("attention.out_proj.weight", 1, [[0, 1], [2, 3]]),
        ]
    }
    (group,) = groups.by_name.values()
    assert [(each.tensor, each.places.tolist()) for each in group.carried] == [
        ("attention.in_proj_bias", [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]])
    ]
    assert groups.counts({group.name: 1}) == {"attention.in_proj_weight": 6 * 4, "attention.out_proj.weight": 4 * 2}
    masks = groups.masks({group.name: np.array([False, True])})
    small = compact(masked(model, masks), torch.zeros(2, TOKENS, 4, dtype=torch.double))
    assert isinstance(small.model.attention, FewerHeads)
    assert (small.model.attention.num_heads, small.model.attention.embed_dim) == (1, 4)
    assert small.removed == {"attention": 6, "attention.out_proj": 0}
    assert {name: tuple(tensor.shape) for name, tensor in small.model.named_parameters()} == {
        "attention.in_proj_weight": (6, 4), "attention.in_proj_bias": (6,),
        "attention.out_proj.weight": (4, 2), "attention.out_proj.bias": (4,),
    }  # fmt: skip
    inputs = torch.randn(3, TOKENS, 4, dtype=torch.double)
    torch.testing.assert_close(small.model(inputs), masked(model, masks)(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_module_that_lost_no_head_gives_what_torchs_gives(batch_first: bool, bias: bool) -> None:
    model = filled(Torchs(batch_first, bias))
    other = copy.deepcopy(model)
    refit(other.attention)
    assert type(other.attention) is nn.MultiheadAttention
    other.attention.__class__ = FewerHeads
    inputs = torch.randn(3, TOKENS, 4, dtype=torch.double)
    torch.testing.assert_close(other(inputs), model(inputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.train()(inputs), model.train()(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_heads_that_code_splits_off_are_found(form: str) -> None:
    """Of three in one and of one layer each: each head has rows for queries, keys and values, and columns."""
    groups = groups_of(filled(Attention(WIDTH, HEADS, form)), TOKENS, WIDTH)
    (group,) = groups.by_name.values()
    assert group.units == HEADS
    second = {(each.tensor, each.axis): each.places[1].tolist() for each in (*group.members, *group.carried)}
    if "qkv.weight" in groups.shapes:
        rows = {("qkv.weight", 0): [2, 3, 10, 11, 18, 19], ("qkv.bias", 0): [2, 3, 10, 11, 18, 19]}
    else:
        rows = {(f"{name}.{kind}", 0): [2, 3] for name in ("query", "key", "value") for kind in ("weight", "bias")}
    assert second == rows | {("out.weight", 1): [2, 3]}
    numbers = {"timm": 2, "products": 2, "normed": 2, "views": 4, "chunks": 0, "masked": 2, "causal": 0}
    assert len(groups.hard_coded) == numbers[form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [(0,), (1, 3), (0, 1, 2)])
def test_without_heads_the_outputs_are_those_of_the_masked_network(
    form: str, heads: tuple[int, ...], tmp_path: Path
) -> None:
    model = filled(Attention(WIDTH, HEADS, form))
    groups = groups_of(model, TOKENS, WIDTH)
    masks = groups.masks(kept(groups, *heads))
    whole, inputs = masked(model, masks), torch.randn(3, TOKENS, WIDTH, dtype=torch.double)
    small = compact(whole, inputs[:1])
    assert len(small.model.out.weight[0]) == 2 * len(heads)
    torch.testing.assert_close(small.model(inputs), whole(inputs), rtol=1e-12, atol=1e-12)
    if form != "masked":
        torch.testing.assert_close(small.model(inputs[:2, :3]), whole(inputs[:2, :3]), rtol=1e-12, atol=1e-12)
    assert isinstance(small.model, torch.fx.GraphModule) == bool(groups.hard_coded) == bool(small.resized)
    save_compact(small, tmp_path / "compact.safetensors")
    again = rebuild(Attention(WIDTH, HEADS, form).double(), tmp_path / "compact.safetensors")
    assert torch.equal(again(inputs), small.model(inputs))
    if not groups.hard_coded:
        assert torch.equal(shrink(model, groups, masks).model(inputs), small.model(inputs))


def test_a_vision_transformer_loses_heads_and_hidden_units_of_each_block(tmp_path: Path) -> None:
    def made() -> nn.Module:
        return torchvision.models.VisionTransformer(8, 4, 2, HEADS, 16, 24, num_classes=3)

    model = filled(made())
    groups = groups_of(model, 3, 8, 8)
    blocks = [f"encoder.layers.encoder_layer_{number}" for number in range(2)]
    assert groups.sizes == {
        name: units
        for block in blocks
        for name, units in ((f"{block}.self_attention.in_proj_weight", HEADS), (f"{block}.mlp.0.weight", 24))
    }
    masks = groups.masks(kept(groups, 0, 2))
    whole, inputs = masked(model, masks), torch.randn(3, 3, 8, 8, dtype=torch.double)
    small = compact(whole, inputs)
    assert small.narrowed == [f"{block}.self_attention" for block in blocks]
    torch.testing.assert_close(small.model(inputs), whole(inputs), rtol=1e-9, atol=1e-9)
    save_compact(small, tmp_path / "compact.safetensors")
    assert torch.equal(rebuild(made().double(), tmp_path / "compact.safetensors")(inputs), small.model(inputs))
    program = torch.export.export(small.model, (inputs,))
    torch.testing.assert_close(program.module()(inputs), whole(inputs), rtol=1e-9, atol=1e-9)


def test_a_head_that_nobody_reads_is_dead_and_one_always_stays() -> None:
    model = filled(Torchs(batch_first=True))
    with torch.no_grad():
        model.attention.out_proj.weight[:, :2] = 0
    inputs = torch.randn(3, TOKENS, 4, dtype=torch.double)
    small = compact(model, inputs)
    assert small.removed["attention"] == 6
    torch.testing.assert_close(small.model(inputs), model(inputs), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.attention.out_proj.weight.zero_()
    small = compact(model, inputs)
    assert small.removed["attention"] == 6
    torch.testing.assert_close(small.model(inputs), model(inputs), rtol=1e-12, atol=1e-12)


class Otherwise(nn.Module):
    """Attention in a way that takes no fewer heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        options = {"bias_kv": {"add_bias_kv": True}, "zero": {"add_zero_attn": True}, "sizes": {"kdim": 6, "vdim": 6}}
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options.get(how, {}))
        self.other = nn.Linear(4, 6 if how == "sizes" else 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how in ("other", "sizes"):
            other = self.other(x)
            y, _ = self.attention(x, other, other)
        elif self.how == "mask":
            y, _ = self.attention(x, x, x, attn_mask=torch.zeros(TOKENS, TOKENS, dtype=x.dtype))
        elif self.how == "weights":
            y, looked = self.attention(x, x, x)
            y = y + looked.mean(2, keepdim=True)
        elif self.how == "twice":
            y, _ = self.attention(x, x, x)
            y, _ = self.attention(y, y, y)
        else:
            y, _ = self.attention(x, x, x)
        return y


@pytest.mark.parametrize("how", ["other", "sizes", "mask", "weights", "twice", "bias_kv", "zero"])
def test_attention_that_cannot_lose_heads_is_named_and_left_alone(how: str) -> None:
    model = filled(Otherwise(how))
    groups = groups_of(model, TOKENS, 4)
    assert groups.by_name == {}
    assert any("attention (MultiheadAttention)" in note for note in groups.notes)
    with torch.no_grad():
        model.attention.out_proj.weight[:, :2] = 0
    inputs = torch.randn(3, TOKENS, 4, dtype=torch.double)
    torch.testing.assert_close(compact(model, inputs).model(inputs), model(inputs))


@pytest.mark.parametrize("how", ["mixed", "added", "sorted", "apart"])
def test_code_that_does_not_keep_heads_apart_keeps_them_all(how: str) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.out = nn.Linear(4, 8), nn.Linear(8, 4)
            self.table = nn.Parameter(torch.randn(1, 1, HEADS, 2))

        def forward(self, x: Tensor) -> Tensor:
            heads = self.wide(x).view(len(x), TOKENS, HEADS, 2)
            if how == "mixed":
                heads = heads.softmax(2)
            elif how == "added":
                heads = heads + self.table
            elif how == "sorted":
                heads = torch.sort(heads, 2).values
            else:
                heads = heads.relu()
            return self.out(heads.flatten(2))

    model = filled(Mixing())
    groups = groups_of(model, TOKENS, 4)
    assert groups.by_name == {}
    with torch.no_grad():
        model.out.weight[:, 2:4] = 0
        model.out.weight[:, 6] = 0
    inputs = torch.randn(2, TOKENS, 4, dtype=torch.double)
    torch.testing.assert_close(compact(model, inputs).model(inputs), model(inputs))


def test_heads_whose_number_the_code_reads_stay() -> None:
    assert groups_of(filled(Attention(WIDTH, HEADS, "timm")), TOKENS, WIDTH).by_name
    assert groups_of(filled(Attention(WIDTH, HEADS, "counted")), TOKENS, WIDTH).by_name == {}
