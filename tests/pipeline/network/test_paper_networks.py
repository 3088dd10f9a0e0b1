"""The paper's ImageNet networks against its tables, and the settings that come with secateur."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from requested import allocate
from torch import nn

from pipeline.network.build import build_network
from pipeline.network.cost import flops
from pipeline.network.paper_networks import BUILTIN, alexnet_caffe, vgg_16
from pipeline.network.survey import survey
from pipeline.prune import round_plan
from pipeline.settings.config import load_config
from pipeline.task.feed import Feed
from pipeline.train import session

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
IMAGENET = ["alexnet-paper", "vgg16-paper", "alexnet-torchvision", "vgg16-bn", "resnet-50", "mobilenet-v3"]
DEPTHWISE = 9  # weights of a 3x3 depthwise kernel's channel


def on_meta(factory: Callable[..., nn.Module], **kwargs: object) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return factory(**kwargs)


def test_alexnet_is_the_papers() -> None:
    """Table 4: weights and FLOPs of each layer."""
    model = on_meta(alexnet_caffe)
    assert sum(p.numel() for p in model.parameters()) == 60_965_224
    assert {t.name: t.weights for t in survey(model)[0]} == {
        "conv1.weight": 34_848, "conv2.weight": 307_200, "conv3.weight": 884_736, "conv4.weight": 663_552,
        "conv5.weight": 442_368, "fc6.weight": 37_748_736, "fc7.weight": 16_777_216, "fc8.weight": 4_096_000,
    }  # fmt: skip
    counts = [round(count / 1e6) for count in flops(model, (3, 227, 227)).values()]
    # The paper writes 75M for fc6, which is 75.5M.
    assert counts == [211, 448, 299, 224, 150, 75, 34, 8]


def test_vgg_16_is_the_papers() -> None:
    model = on_meta(vgg_16)
    assert sum(p.numel() for p in model.parameters()) == 138_357_544
    prunable, _ = survey(model)
    blocks = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
    names = [f"conv{block}_{i}.weight" for block, count in blocks.items() for i in range(1, count + 1)]
    assert [t.name for t in prunable] == [*names, "fc6.weight", "fc7.weight", "fc8.weight"]
    counts = flops(model, (3, 224, 224))
    assert [counts[f"{name}.weight"] for name in ("conv1_1", "conv1_2", "conv5_3", "fc6")] == [
        173_408_256, 3_699_376_128, 924_844_032, 205_520_896,
    ]  # fmt: skip
    assert sum(counts.values()) == pytest.approx(30.9e9, rel=0.01)


@pytest.mark.parametrize("name", ["alexnet_caffe", "vgg_16"])
def test_classes_and_dropout(name: str) -> None:
    model = on_meta(BUILTIN[name], classes=7, dropout=0.3)
    assert model.get_submodule("fc8").out_features == 7
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3]
    assert on_meta(BUILTIN[name], classes=7, dropout=0).state_dict().keys() == model.state_dict().keys()


def test_alexnets_normalisation_is_caffes() -> None:
    """Caffe: x / (1 + alpha / n * sum of squares over n channels)^beta, zeros beyond the border."""
    norm = on_meta(alexnet_caffe).get_submodule("norm1")
    x = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 4, 1, 1)
    squares = torch.tensor([1400.0, 3000.0, 3000.0, 2900.0])  # of five channels each, hand-summed
    expected = x.flatten() / (1 + 1e-4 / 5 * squares) ** 0.75
    assert torch.allclose(norm(x).flatten(), expected)


def test_alexnets_first_weights_are_caffes() -> None:
    torch.manual_seed(0)
    model = alexnet_caffe(classes=10)
    parts = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    for name, part in parts.items():
        std = 0.005 if name in ("fc6", "fc7") else 0.01
        assert part.weight.std().item() == pytest.approx(std, rel=0.02), name
        assert part.bias is not None
        assert part.bias.unique().tolist() == pytest.approx([0.0 if name in ("conv1", "conv3", "fc8") else 0.1])


@pytest.mark.parametrize("name", IMAGENET)
def test_the_network_of_each_config_builds_and_can_be_pruned(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", ["data.root=/somewhere"])
    model = build_network(config.model, 1000, config.seed)
    session.check_output(model, config.model.factory, Feed.of(config), 1000)
    prunable, left_out = survey(model, config.prune.include, config.prune.exclude)
    assert len(prunable) >= 8
    kinds = {item.reason.split(" (")[0] for item in left_out}
    assert kinds <= {"bias", "normalisation"}


@pytest.mark.parametrize(("name", "kept"), [("alexnet-paper", 6.7e6), ("vgg16-paper", 10.3e6)])
def test_the_papers_densities_give_the_papers_size(name: str, kept: float) -> None:
    """Table 1: 6.7M of 61M weights, 10.3M of 138M; every tensor is named, and the rounds fall to it."""
    config = load_config(CONFIGS / f"{name}.yaml", ["data.root=/somewhere"])
    factory = BUILTIN[config.model.factory]
    prunable, _ = survey(on_meta(factory))
    assert set(config.prune.densities) == {t.name for t in prunable}
    planned = round_plan.densities(config.prune, config.target)
    assert len(planned) == 5
    sizes = []
    for density in planned:
        wanted = round_plan.explicit_densities(config.prune, config.target, density)
        sizes.append(sum(round(t.weights * wanted[t.name]) for t in prunable))
    assert sizes == sorted(sizes, reverse=True)
    # The tables round to whole percents: fc6 of VGG-16 at 4% is 4.1M weights, give or take 0.5M.
    assert sizes[-1] == pytest.approx(kept, rel=0.03)
    assert sum(t.weights for t in prunable) / sizes[-1] == pytest.approx(config.target.compression, rel=0.04)


def test_erk_leaves_depthwise_kernels_all_but_dense() -> None:
    config = load_config(CONFIGS / "mobilenet-v3.yaml", ["data.root=/somewhere"])
    prunable, _ = survey(build_network(config.model, 1000))
    scores = {t.name: torch.zeros(t.shape) for t in prunable}
    alive = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    budget = sum(t.weights for t in prunable) // 2
    counts = allocate("erk", scores, alive, budget)
    depthwise = [t for t in prunable if t.kind == "conv" and t.shape[1] == 1]
    assert len(depthwise) == 15
    assert all(counts[t.name] == t.weights for t in depthwise if t.shape[2] ** 2 == DEPTHWISE)
