"""Statistics of weights on samples, worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.calibrate import layer_inputs, statistics
from pipeline.data.loader import Batch
from pipeline.prune.criteria import CRITERIA
from pipeline.settings.config import Config
from pipeline.settings.pruning import Prune
from pipeline.task.feed import Feed
from pipeline.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def config(tiny: Callable[..., Config]) -> Config:
    return tiny(**{"data.mean": [0.0], "data.std": [1.0]})


def batch(pixels: list[list[int]], labels: list[int], bad: int = 0) -> Batch:
    """Images of one row of pixels, 0 or 255, read as 0 or 1; the last `bad` of them could not be read."""
    images = torch.tensor(pixels, dtype=torch.uint8).view(len(pixels), 1, 1, -1)
    weights = torch.ones(len(pixels))
    weights[len(pixels) - bad :] = 0
    return Batch(images, torch.tensor(labels), weights, torch.arange(len(pixels)))


def measure(kind: str, model: nn.Module, names: list[str], batches: list[Batch], config: Config) -> dict[str, Tensor]:
    criterion = {"gradient": "taylor", "curvature": "obs"}[kind]
    return statistics.measure(criterion, model, names, lambda: batches, Feed.of(config), ALONE)


def test_gradients_are_of_small_groups_and_their_size_is_averaged(config: Config) -> None:
    """With W = 0 both classes have 1/2, so g = (1/2 - onehot) xᵀ: ∓1/2 for x₁ in the first group, ±1/2 for x₂ in the
    second, 0 for the other; over two groups |g| is 1/4 on average."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(2, 2, bias=False)).train()
    nn.init.zeros_(model[2].weight)
    model[2].weight.requires_grad_(False)
    batches = [batch([[255, 0]] * 8, [0] * 8), batch([[0, 255]] * 8 + [[255, 255]], [1] * 9, bad=1)]
    found = measure("gradient", model, ["2.weight"], batches, config)["2.weight"]
    assert torch.allclose(found, torch.full((2, 2), 0.25))
    assert model.training
    assert not model[2].weight.requires_grad
    # Within a group the mean comes first: of one input with both labels it is 0.
    mixed = [batch([[255, 255]] * 8, [0, 1] * 4)]
    assert not measure("gradient", model, ["2.weight"], mixed, config)["2.weight"].any()


def test_curvature_is_what_is_left_when_the_other_input_makes_up(config: Config) -> None:
    """x = (1, 1), (1, 0): H = [[1, 1/2], [1/2, 1/2]]; 1/[H⁻¹]_jj = det H / H_ii, with 1% of 3/4 on the diagonal."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    found = measure("curvature", model, ["1.weight"], [batch([[255, 255], [255, 0]], [0, 0])], config)["1.weight"]
    determinant = 1.0075 * 0.5075 - 0.25
    expected = torch.tensor([[determinant / 0.5075, determinant / 1.0075]]).expand(3, 2)
    assert torch.allclose(found, expected)


def test_the_layer_of_attention_that_is_never_called_has_no_curvature() -> None:
    obs = Prune.model_validate({"criterion": "obs"})
    with pytest.raises(UserError, match=r"attention\.out_proj\.weight belongs to a NonDynamicallyQuantizableLinear"):
        statistics.require(networks.Attending(), ["attention.out_proj.weight"], obs)
    statistics.require(networks.Attending(), ["embed.weight", "head.weight"], obs)


def test_curvature_of_a_layer_called_by_keyword(config: Config) -> None:
    torch.manual_seed(0)
    by_name, batches = networks.ByName(), [batch(torch.randint(0, 256, (20, 64)).tolist(), [0] * 20)]
    by_place = nn.Sequential(nn.Flatten(), by_name.fc1, nn.ReLU(), by_name.fc2)
    found = measure("curvature", by_name, ["fc2.weight"], batches, config)["fc2.weight"]
    assert torch.equal(found, measure("curvature", by_place, ["3.weight"], batches, config)["3.weight"])


def test_curvature_of_a_grouped_convolution_is_that_of_each_group(config: Config) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, (1, 2)), nn.Conv2d(4, 6, (1, 2), groups=2, padding=(0, 1)))
    batches = [batch(torch.randint(0, 256, (40, 6)).tolist(), [0] * 40)]
    found = measure("curvature", model, ["1.weight"], batches, config)["1.weight"]
    with torch.no_grad():
        inputs = model[0](batches[0].images.float() / 255)
    for group in range(2):
        alone = nn.Conv2d(2, 3, (1, 2), padding=(0, 1))
        rows = layer_inputs.rows(alone, inputs[:, 2 * group : 2 * group + 2], 0)[0].double()
        hessian = rows.T @ rows / 40
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(4)
        expected = 1 / hessian.inverse().diagonal()
        part = found[3 * group : 3 * group + 3].reshape(3, 4)
        assert torch.allclose(part, expected.float().expand(3, 4), rtol=1e-4)


def test_curvature_of_inputs_that_are_always_0_is_finite(config: Config) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    found = measure("curvature", model, ["1.weight"], [batch([[0, 0]], [0])], config)["1.weight"]
    assert bool(torch.isfinite(found).all())
    assert float(found.max()) < 1e-30


def test_a_layer_with_too_many_inputs_for_obs_is_one_message() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(25088, 4096))
    with pytest.raises(UserError, match=r"prune\.criterion=obs: 0\.weight has so many inputs.*prune\.exclude"):
        statistics.require(model, ["0.weight"], Prune.model_validate({"criterion": "obs"}))
    statistics.require(model, ["0.weight"], Prune.model_validate({"criterion": "taylor"}))
    statistics.require(model, ["0.weight"], Prune())


def test_every_statistic_that_a_criterion_needs_can_be_measured() -> None:
    assert {row.statistic for row in CRITERIA.values()} - {None} == statistics.STATISTICS.keys()
