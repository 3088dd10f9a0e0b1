"""FLOPs, packed bytes and prices of small tensors, worked by hand."""

from __future__ import annotations

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import SwinTransformer, VisionTransformer

from pipeline.base.errors import UserError
from pipeline.network import cost
from pipeline.network.survey import survey


def test_flops_are_two_for_each_weight_and_output_position() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3))
    # The convolution has 18 weights and 4 x 4 positions, the linear layer 96 weights and one.
    assert cost.flops(network, (1, 4, 4)) == {"0.weight": 2 * 18 * 16, "2.weight": 2 * 96}


def test_a_group_sees_only_its_own_channels_and_a_second_call_counts_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.spare = nn.Conv2d(2, 2, 1, groups=2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    # Two weights, 9 positions, called twice; the layer that is never called has none.
    assert cost.flops(Twice(), (2, 3, 3)) == {"conv.weight": 2 * (2 * 2 * 9), "spare.weight": 0}


def test_an_input_that_does_not_fit_is_refused_and_modes_are_put_back() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).train()
    with pytest.raises(UserError, match=r"does not take an input of shape \(1, 3, 3\)"):
        cost.flops(network, (1, 3, 3))
    assert network.training


def test_bytes_with_a_codebook_by_hand() -> None:
    # half of 800: a bit of mask each, 400 values of 5 bits, 32 centroids of 2 bytes
    assert cost.packed_bytes(800, 400, 5) == 100 + 250 + 64
    assert cost.packed_bytes(800, 800, 8) == 800 + 512
    assert cost.packed_bytes(10, 10, 8) == 10 + 20
    assert cost.packed_bytes(10, 0, 8) == 0


def test_packed_bytes_are_values_and_the_smaller_index() -> None:
    assert cost.packed_bytes(1000, 0) == 0
    assert cost.packed_bytes(1000, 1000) == 4000  # dense: no index
    assert cost.packed_bytes(800, 400) == 400 * 4 + 100  # a bit for each of 800 weights beats gaps of 2 on average
    assert cost.packed_bytes(100_000, 100) < 100 * 4 + 100_000 / 8  # gaps beat the bitmask where few are kept


@pytest.mark.parametrize(("quantity", "expected"), [("weights", 5), ("flops", 5 * 12), ("bytes", 5 * 4 + 2)])
def test_prices(quantity: cost.Quantity, expected: int) -> None:
    assert cost.price(quantity, 10, 120)(5) == expected


def test_attention_counts_by_the_weights_that_it_uses() -> None:
    found = cost.count(networks.Attending(), (1, 8, 8))
    # 16 patches of 8 numbers: 4 weights to each, three projections of 8 x 8 and one after; the head reads one mean.
    assert found.by_tensor == {
        "embed.weight": 2 * 4 * 8 * 16,
        "attention.in_proj_weight": 2 * 3 * 8 * 8 * 16,
        "attention.out_proj.weight": 2 * 8 * 8 * 16,
        "head.weight": 2 * 8 * 10,
    }
    assert found.unattributed == 2 * (2 * 16 * 16 * 8)  # queries times keys, and their shares times values
    assert found.outside == ("attention.in_proj_weight", "attention.out_proj.weight")
    assert found.unused == found.uncounted == ()


def test_projections_of_their_own_sizes_count() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, kdim=6, vdim=3, batch_first=True)
            self.query = nn.Parameter(torch.zeros(1, 2, 4))

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.attention(self.query, x, x[..., :3])[0]
            return mixed

    # Two queries of 4 numbers; five keys of 6 and five values of 3.
    assert cost.flops(Cross(), (5, 6)) == {
        "attention.q_proj_weight": 2 * 16 * 2,
        "attention.k_proj_weight": 2 * 24 * 5,
        "attention.v_proj_weight": 2 * 12 * 5,
        "attention.out_proj.weight": 2 * 16 * 2,
    }


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_path_is_counted_by_its_parts_and_comes_back(fused: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        found = cost.flops(networks.Encoding(), (1, 8, 8))
        assert torch.backends.mha.get_fastpath_enabled() == fused
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert found == {
        "embed.weight": 2 * 4 * 8 * 16,
        "encoder.self_attn.in_proj_weight": 2 * 3 * 8 * 8 * 16,
        "encoder.self_attn.out_proj.weight": 2 * 8 * 8 * 16,
        "encoder.linear1.weight": 2 * 8 * 16 * 16,
        "encoder.linear2.weight": 2 * 8 * 16 * 16,
        "head.weight": 2 * 8 * 10,
    }


def test_a_weight_used_outside_of_its_layer_counts_again() -> None:
    found = cost.count(networks.ThereAndBack(), (1, 8, 8))
    assert found.by_tensor == {"fc1.weight": 2 * (2 * 64 * 16), "fc2.weight": 2 * 64 * 10}
    assert found.outside == ("fc1.weight",)


def test_layers_called_by_keyword_count() -> None:
    assert cost.flops(networks.ByName(), (1, 8, 8)) == {"fc1.weight": 2 * 64 * 16, "fc2.weight": 2 * 16 * 10}


def test_a_tied_weight_counts_for_each_layer_under_its_first_name() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    network[2].weight = network[1].weight
    assert cost.flops(network, (1, 2, 2)) == {"1.weight": 2 * (2 * 16)}


class Computed(nn.Module):
    """Weights that reach a multiplication after a cast, a mask, a copy, a slice, or together with another weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        weight = self.one.weight
        if self.how == "both":
            return F.linear(x, weight + self.two.weight)
        if self.how == "looked at":
            return x * weight.abs().sum() * self.two.weight.std()
        if self.how == "vector":
            return F.linear(x[0], weight)
        ways = {
            "cast": lambda: weight.double().float(),
            "masked": lambda: weight * torch.ones(4, 4),
            "standardised": lambda: (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1),
            "copied": lambda: torch.empty(4, 4).copy_(weight),
            "sliced": lambda: torch.cat([weight[:2], weight[2:]]),
            "contiguous": lambda: weight.t().contiguous().t(),
        }
        return F.linear(x, ways[self.how]())


@pytest.mark.parametrize("how", ["cast", "masked", "standardised", "copied", "sliced", "contiguous", "vector"])
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_computed_from_one_weight_is_that_weight(how: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        found = cost.count(Computed(how), (4,))
    assert (found.by_tensor, found.unattributed) == ({"one.weight": 32, "two.weight": 0}, 0)
    assert (found.unused, found.uncounted) == (("two.weight",), ())


@pytest.mark.parametrize(("how", "flops"), [("both", 32), ("looked at", 0)])
def test_what_cannot_be_attributed_is_not_taken_for_free(how: str, flops: int) -> None:
    found = cost.count(Computed(how), (4,))
    assert found.unattributed == flops
    assert (found.unused, found.uncounted) == ((), ("one.weight", "two.weight"))


def test_weights_that_lie_in_one_memory_are_told_apart() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    flat = torch.zeros(18)
    network[0].weight = nn.Parameter(flat[:12].view(3, 4))
    network[2].weight = nn.Parameter(flat[12:].view(2, 3))
    assert cost.flops(network, (4,)) == {"0.weight": 24, "2.weight": 12}


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_every_flop_of_a_transformer_is_that_of_torchs_counter(name: str) -> None:
    if name == "vit":
        network: nn.Module = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    else:
        network = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5)
    network.eval()
    found = cost.count(network, (3, 32, 32))
    torch.backends.mha.set_fastpath_enabled(False)
    try:  # a CPU's own kernel of attention is one that torch's counter leaves out
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            network(torch.zeros(1, 3, 32, 32))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert sum(found.by_tensor.values()) + found.unattributed == counter.get_total_flops()
    prunable, _ = survey(network)
    assert {tensor.name for tensor in prunable} == found.by_tensor.keys()
    assert all(found.by_tensor[tensor.name] > 0 for tensor in prunable)
    by_module = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    layers = {path: part for path, part in network.named_modules() if type(part) in (nn.Linear, nn.Conv2d)}
    checked = 0
    for path in layers:
        full = f"{type(network).__name__}.{path}"
        if full in by_module:
            assert found.by_tensor[f"{path}.weight"] == by_module[full], path
            checked += 1
    assert checked >= 6
