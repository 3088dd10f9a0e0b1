"""A step makes nothing wait for the device: what would read a number back is counted, at dispatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.base.errors import Agreed
from pipeline.train.finite import Finite
from pipeline.train.loop import Training
from pipeline.train.session import Session

CPU = torch.device("cpu")
NAME = "fc1.weight"
# Operators whose result, or its shape, the host has to know before it goes on.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # by a mask they do, too


class Waits(TorchDispatchMode):
    """Counts operators that wait for the device, or take something from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(WAITING):
            self.found[name] += 1
        if name in INDEXING and any(each is not None and each.dtype == torch.bool for each in args[1]):
            self.found["index by a mask"] += 1
        return func(*args, **(kwargs or {}))


def test_what_waits_is_counted() -> None:
    values = torch.tensor([1.0, 0.0])
    with Waits() as waits:
        float(values[0])
        bool(values.sum() > 0)
        values[values > 0]
    assert waits.found == {"_local_scalar_dense": 2, "index by a mask": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"clip_norm": 1.0, "l1": 1e-4, "label_smoothing": 0.1},
        {"precision": "bf16", "channels_last": True},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.parametrize("pruned", [False, True])
def test_a_step_waits_for_nothing(pruned: bool, settings: dict[str, Any], small_session: Session) -> None:
    recipe = small_session.config.retrain.model_copy(update={"distill": 0.5, **settings})
    model, teacher = small_session.new_model(), small_session.new_model().eval()
    mask = {NAME: torch.rand(model.get_parameter(NAME).shape) < 0.3} if pruned else None
    made = Training(small_session, model, recipe, "dense", "dense", [NAME], mask, teacher=teacher)
    steps = made.loader.epoch(0)
    made._update(made.model, next(steps))  # the first makes the optimizer's state
    batch = next(steps)
    with Waits() as waits:
        made._update(made.model, batch)
    steps.close()  # type: ignore[attr-defined]
    assert waits.found == {}


@pytest.fixture
def noted() -> Callable[..., Finite]:
    """Verdicts on steps 0, 1, ... with these norms."""

    def make(*norms: float) -> Finite:
        made = Finite(CPU)
        for step, norm in enumerate(norms):
            flag = made.note(step, 0.1, torch.tensor(norm))
            assert float(flag) == float(not torch.isfinite(torch.tensor(norm)))
        return made

    return make


def test_a_bad_step_is_told_with_its_number_and_once(noted: Callable[..., Finite]) -> None:
    assert noted(1.0, 2.0).first_bad() is None
    for norm in (float("nan"), float("inf")):
        finite = noted(1.0, norm, 2.0)
        bad = finite.first_bad()
        assert bad is not None
        assert (bad.step, bad.rate) == (1, 0.1)
        assert finite.first_bad() is None


def test_with_a_lag_the_last_steps_are_left_for_later(noted: Callable[..., Finite]) -> None:
    finite = noted(1.0, float("nan"))
    assert finite.first_bad(lag=1) is None
    finite.note(2, 0.1, torch.tensor(1.0))
    bad = finite.first_bad(lag=1)
    assert bad is not None
    assert bad.step == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_bad_gradient_changes_nothing_even_if_it_is_noticed_later(optimizer: str, small_session: Session) -> None:
    """As on a GPU, where the update has been asked for before the verdict is known."""
    recipe = small_session.config.dense.model_copy(update={"optimizer": optimizer})
    made = Training(small_session, small_session.new_model(), recipe, "dense", "dense", [NAME])
    made.finite.lag = 1
    first, second, third = (batch for batch, _ in zip(made.loader.epoch(0), range(3), strict=False))
    made._update(made.model, first)
    made.position.step = 1
    before = {name: value.detach().clone() for name, value in made.parameters.items()}
    state = {key: value.clone() for key, value in made.optimizer.state[made.parameters[NAME]].items()}
    second.weights[0] = float("nan")
    made._update(made.model, second)
    for name, value in made.parameters.items():
        assert torch.equal(value, before[name]), name
    for key, value in made.optimizer.state[made.parameters[NAME]].items():
        assert torch.equal(value, state[key]), key
    made.position.step = 2
    with pytest.raises(Agreed, match="the gradient of step 1 is not finite"):
        made._update(made.model, third)
