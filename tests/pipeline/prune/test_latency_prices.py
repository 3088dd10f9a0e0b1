"""Predicted latency: fitted to times of a known form, and spent as a budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.base.errors import UserError
from pipeline.network.groups import Groups, Step, Width, find
from pipeline.prune import channels, latency
from pipeline.run.records import LatencyTable, Timed
from pipeline.settings.pruning import Prune, Target

KEEPS = [(8, 16), (4, 16), (8, 4), (2, 2), (6, 11), (1, 1), (3, 9)]


def chain() -> Groups:
    """Layers of 4 to 8, 8 to 16 and 16 to 3, with what lies between them."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    return find(model, torch.zeros(2, 4), {"0.weight": (8, 4), "2.weight": (16, 8), "4.weight": (3, 16)})


CHAIN = chain()


def timed(first: int, second: int) -> Timed:
    """Each linear layer takes 1 ms and 0.1 ms a weight, each ReLU 0.01 ms a channel; a pass twice the sum, and 5 ms."""
    steps = {
        "_0": 1 + 0.1 * 4 * first, "_1": 0.01 * first, "_2": 1 + 0.1 * first * second, "_3": 0.01 * second,
        "_4": 1 + 0.1 * 3 * second,
    }  # fmt: skip
    return Timed({"0.weight": first, "2.weight": second}, 5 + 2 * sum(steps.values()), steps)


def table() -> LatencyTable:
    return LatencyTable("a device", 1, "network", tuple(timed(*keep) for keep in KEEPS))


def test_steps_have_the_channels_that_they_read_and_make() -> None:
    nothing = Width(4, {})
    first, second = Width(0, {"0.weight": 8}), Width(0, {"2.weight": 16})
    assert CHAIN.steps == (
        Step("_0", nothing, first),
        Step("_1", first, first),
        Step("_2", first, second),
        Step("_3", second, second),
        Step("_4", second, Width(3, {})),
    )


@given(st.integers(1, 8), st.integers(1, 16))
def test_times_of_the_fitted_form_are_predicted_at_widths_that_were_not_measured(first: int, second: int) -> None:
    price = latency.price(CHAIN, table())
    assert price({"0.weight": first, "2.weight": second}) == pytest.approx(1e6 * timed(first, second).ms, rel=1e-6)


def test_the_error_is_that_of_the_worst_network_measured() -> None:
    assert latency.error(CHAIN, table()) < 1e-6
    off = Timed(timed(8, 16).keep, 2 * timed(8, 16).ms, timed(8, 16).steps)
    assert latency.error(CHAIN, LatencyTable("a device", 1, "network", (off, *table().timed))) > 0.2


@given(st.lists(st.floats(0.0, 10.0), min_size=12, max_size=12), st.integers(1, 7), st.integers(1, 15))
def test_fewer_channels_never_take_longer_whatever_was_measured(noise: list[float], first: int, second: int) -> None:
    rows = [timed(*keep) for keep in KEEPS[:6]]
    noisy = tuple(
        Timed(row.keep, row.ms * noise[2 * i], {name: ms * noise[2 * i + 1] for name, ms in row.steps.items()})
        for i, row in enumerate(rows)
    )
    price = latency.price(CHAIN, LatencyTable("a device", 1, "network", noisy))
    here = price({"0.weight": first, "2.weight": second})
    assert here <= price({"0.weight": first + 1, "2.weight": second})
    assert here <= price({"0.weight": first, "2.weight": second + 1})


def test_a_budget_of_time_is_met_by_the_most_channels() -> None:
    price, prune = latency.price(CHAIN, table()), Prune.model_validate({"pattern": "channels", "allocation": "uniform"})
    units = {"0.weight": torch.arange(8.0), "2.weight": torch.arange(16.0)}
    keep = channels.plan(prune, CHAIN, units, CHAIN.whole, 30_000_000, price, unit="latency")
    assert price(keep) <= 30_000_000 < price({**keep, "2.weight": keep["2.weight"] + 1})
    with pytest.raises(UserError, match=r"the fewest channels cost 12\.\d ms, more than the budget of 10 ms \(target"):
        channels.plan(prune, CHAIN, units, CHAIN.whole, 10_000_000, price, unit="latency")


def test_milliseconds_are_a_compression_of_the_whole_networks_time() -> None:
    target = Target.model_validate({"budget": "latency", "latency_ms": 4.0})
    assert latency.aimed(target, 10_000_000).compression == 2.5
    unasked = Target.model_validate({"budget": "latency", "compression": 3.0})
    assert latency.aimed(unasked, 10_000_000) == unasked
    with pytest.raises(UserError, match=r"target.latency_ms=4 removes nothing: by its table .* takes 3.5 ms"):
        latency.aimed(target, 3_500_000)
