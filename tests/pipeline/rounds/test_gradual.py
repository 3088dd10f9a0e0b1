"""Gradual pruning: when weights go and how many, by hand; and a run with it, stopped on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import carry_out, equal, final_weights

from pipeline import stages
from pipeline.base.errors import UserError
from pipeline.network import dead
from pipeline.network.build import build_network
from pipeline.prune.gradual import Gradual, Masks
from pipeline.run.state import run_root
from pipeline.settings.config import Config
from pipeline.task.feed import Feed
from pipeline.train import checkpoint
from pipeline.train.loop import Training
from pipeline.train.session import Session


def test_the_density_falls_from_one_rounds_to_the_nexts() -> None:
    asked: list[tuple[float, bool]] = []

    def prune(density: float, alive: Masks, last: bool) -> Masks:
        asked.append((density, last))
        return alive

    gradual = Gradual(prune, before=0.5, after=0.1, share=0.5, every=3)
    due = [step for step in range(16) if gradual.due(step, total=16)]
    assert due == [0, 3, 6, 8]
    for step in due:
        gradual.masks(step, 16, {})
    # what is still to go is (1 - step / 8)^3 of 0.4
    assert asked == [
        (pytest.approx(0.5), False),
        (pytest.approx(0.1 + 0.4 * (5 / 8) ** 3), False),
        (pytest.approx(0.1 + 0.4 * (2 / 8) ** 3), False),
        (0.1, True),
    ]


def test_the_last_prune_is_made_before_the_last_update() -> None:
    gradual = Gradual(lambda density, alive, last: alive, before=1.0, after=0.1, share=1.0, every=100)
    assert [step for step in range(5) if gradual.due(step, total=5)] == [0, 4]
    one = Gradual(lambda density, alive, last: alive, before=1.0, after=0.1, share=0.5, every=100)
    assert one.due(0, total=1)


def test_a_gradual_run_keeps_exact_counts_and_goes_on_where_it_was(
    tiny: Callable[..., Config],
    interrupt: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {
        "prune.gradual": 0.7, "prune.gradual_every": 4, "prune.allocation": "pooled", "retrain.checkpoint_steps": 5,
        "retrain.distill": 0.5,
    }  # fmt: skip
    undisturbed = tiny(name="undisturbed", **settings)
    result = carry_out(undisturbed)
    assert result["weights_kept"] == result["weights_total"] // 6
    root = Path(run_root(undisturbed))
    plan = json.loads((root / "rounds/02/plan.json").read_text())
    assert {row["name"]: row["keep"] for row in plan["tensors"]} == {
        row["name"]: row["kept"] for row in result["layers"]
    }

    stopped = tiny(name="stopped", **settings)
    for step in (13, 30):  # among the prunes, and after the last
        interrupt("rounds/02", step)
        with pytest.raises(KeyboardInterrupt):
            carry_out(stopped)
    monkeypatch.undo()
    carry_out(stopped)
    assert equal(final_weights(undisturbed), final_weights(stopped))
    assert json.loads((Path(run_root(stopped)) / "rounds/02/plan.json").read_text()) == plan


def test_places_of_dead_units_connections_go_to_living_ones(
    tiny: Callable[..., Config], interrupt: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "prune.gradual": 0.7, "prune.gradual_every": 4, "prune.allocation": "pooled", "target.compression": 60,
        "retrain.checkpoint_steps": 5,
    }  # fmt: skip

    def kept_and_dead(config: Config) -> tuple[int, int]:
        saved = checkpoint.load(stages.Run(run_root(config), 1), "rounds/02/checkpoint")
        model = build_network(config.model, 10, 0)
        model.load_state_dict(saved.weights)
        left, _ = dead.remove(model, saved.masks, Feed.of(config).zeros(2), 1)
        kept = sum(int(mask.sum()) for mask in saved.masks.values())
        return kept, kept - sum(int(mask.sum()) for mask in left.values())

    plain, living = tiny(name="plain", **settings), tiny(name="living", **settings, **{"prune.dead_neurons": True})
    budget = carry_out(plain)["weights_total"] // 60
    kept, lost = kept_and_dead(plain)
    assert kept == budget
    assert lost > 0
    assert carry_out(living)["weights_kept"] == budget
    assert kept_and_dead(living) == (budget, 0)

    stopped = tiny(name="stopped", **settings, **{"prune.dead_neurons": True})
    interrupt("rounds/02", 13)  # among the prunes
    with pytest.raises(KeyboardInterrupt):
        carry_out(stopped)
    monkeypatch.undo()
    carry_out(stopped)
    assert equal(final_weights(living), final_weights(stopped))


def test_momentum_of_what_is_pruned_on_the_way_is_gone(small_session: Session) -> None:
    settings = small_session.config.retrain.model_copy(update={"epochs": 1})
    model = small_session.new_model()
    weight = model.get_parameter("fc1.weight")
    everything = {"fc1.weight": torch.ones_like(weight, dtype=torch.bool)}
    training = Training(small_session, model, settings, "momentum", "momentum", ["fc1.weight"], everything)
    training.fit()
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 3 == 0
    training._prune({"fc1.weight": mask})
    [momentum] = training.optimizer.state[weight].values()
    assert bool((momentum[~mask] == 0).all())
    assert bool((momentum[mask] != 0).any())
    assert torch.equal(weight.detach() != 0, mask)


@pytest.mark.parametrize("changed", [{"target.mode": "thresholds"}, {"retrain.epochs": 0}])
def test_what_does_not_go_with_it_is_refused(tiny: Callable[..., Config], changed: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"gradual=0\.5"):
        tiny(**{"prune.gradual": 0.5, **changed})
