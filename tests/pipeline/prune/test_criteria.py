import pytest
import torch

from pipeline.base.errors import UserError
from pipeline.prune import criteria
from pipeline.prune.criteria import scores
from pipeline.settings.pruning import Prune


def test_magnitude_is_the_absolute_value() -> None:
    found = scores("magnitude", {"w": torch.tensor([[-3.0, 0.5], [-0.0, 2.0]])}, seed=0)["w"]
    assert torch.equal(found, torch.tensor([[3.0, 0.5], [0.0, 2.0]]))


def test_magnitude_of_bfloat16_is_exact_in_float32() -> None:
    weight = torch.tensor([-0.1, 7.0], dtype=torch.bfloat16)
    found = scores("magnitude", {"w": weight}, seed=0)["w"]
    assert found.dtype == torch.float32
    assert torch.equal(found, weight.float().abs())


def test_magnitude_leaves_the_weight_alone() -> None:
    weight = torch.nn.Parameter(torch.tensor([-1.0]))
    found = scores("magnitude", {"w": weight}, seed=0)["w"]
    assert weight.item() == -1.0
    assert not found.requires_grad


def test_random_depends_on_seed_and_name_only() -> None:
    ones, twos = torch.ones(50), torch.full((50,), 2.0)
    first = scores("random", {"a": ones, "b": ones}, seed=1)
    assert torch.equal(first["a"], scores("random", {"a": twos}, seed=1)["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], scores("random", {"a": ones}, seed=2)["a"])


def test_random_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    scores("random", {"a": torch.ones(5)}, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_probabilistic_keeps_by_chance_in_proportion_to_magnitude() -> None:
    """Of the weights 1 and 3, one kept: it is the larger three times in four. A pruned 0 never comes before another."""
    pairs = {f"w{i}": torch.tensor([-1.0, 3.0, 0.0]) for i in range(2000)}
    drawn = torch.stack([*scores("probabilistic", pairs, seed=0).values()])
    assert float((drawn.argmax(1) == 1).double().mean()) == pytest.approx(0.75, abs=0.03)
    assert bool((drawn[:, :2] > 0).all())
    assert not drawn[:, 2].any()


def test_probabilistic_depends_on_seed_and_name_and_scales_with_the_weight() -> None:
    ones = torch.ones(50)
    first = scores("probabilistic", {"a": ones, "b": ones}, seed=1)
    assert torch.equal(scores("probabilistic", {"a": 2 * ones}, seed=1)["a"], 2 * first["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], scores("probabilistic", {"a": ones}, seed=2)["a"])


@pytest.mark.parametrize(("criterion", "expected"), [("taylor", [1.0, 6.0]), ("obs", [1.0, 18.0])])
def test_measured_criteria_are_products_with_their_statistic(criterion: str, expected: list[float]) -> None:
    """|w| s and w² s of w = -1, 3 and s = 1, 2."""
    weight, statistic = torch.tensor([-1.0, 3.0]), torch.tensor([1.0, 2.0])
    assert scores(criterion, {"w": weight}, 0, {"w": statistic})["w"].tolist() == expected
    assert scores(criterion, {"w": weight.half()}, 0, {"w": statistic})["w"].dtype == torch.float32


def test_a_criterion_says_which_statistic_it_needs() -> None:
    needed = {name: criteria.of(Prune.model_validate({"criterion": name})).statistic for name in criteria.CRITERIA}
    assert {name: kind for name, kind in needed.items() if kind} == {"taylor": "gradient", "obs": "curvature"}


def test_a_statistic_that_a_criterion_does_not_need_changes_nothing() -> None:
    weights = {"w": torch.tensor([-1.0, 3.0])}
    assert scores("magnitude", weights, 0, {"w": torch.tensor([7.0, 0.0])})["w"].tolist() == [1.0, 3.0]


def test_unknown_criterion_suggests() -> None:
    with pytest.raises(
        UserError,
        match=r"prune.criterion='magnitud'.*did you mean 'magnitude'\? known: magnitude, taylor, obs, probabilistic, ",
    ):
        scores("magnitud", {}, seed=0)
