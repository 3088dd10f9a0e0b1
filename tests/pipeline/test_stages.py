"""How stages are carried out: in order, skipped when finished, made anew when what they rest on has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from tiny_run import ALONE

from pipeline import stages
from pipeline.local import LocalEngine
from pipeline.run.events import Event, StageBegun
from pipeline.run.state import open_run
from pipeline.settings.config import Config
from pipeline.stages import Driver, Stage


@pytest.fixture
def driver(tiny: Callable[..., Config]) -> Iterator[Driver]:
    """Of a run whose events are kept in `driver.progress.__self__`."""
    config = tiny()
    with open_run(config) as here:
        yield Driver(config, LocalEngine(ALONE), here, list[Event]().append)


def stage(name: str, *settings: object, **more: object) -> Stage:
    """Writes NAME/made.json."""
    return Stage(name, name, lambda driver: settings, lambda driver: driver.run.commit(name, name, "made.json"), **more)  # type: ignore[arg-type]


def carried_out(parts: list[Stage], driver: Driver) -> list[tuple[str, bool]]:
    """The names of stages in the order in which they were told of, and whether each was skipped."""
    events = list[Event]()
    stages.carry_out(parts, replace(driver, progress=events.append))
    return [(event.stage, event.skipped) for event in events if isinstance(event, StageBegun)]


def test_stages_go_in_order_and_are_skipped_when_finished(driver: Driver) -> None:
    parts = [stage("one", 1), stage("two", 2), stage("three", 3)]
    assert carried_out(parts, driver) == [("one", False), ("two", False), ("three", False)]
    assert carried_out(parts, driver) == [("one", True), ("two", True), ("three", True)]
    assert driver.run.read("two", "made.json") == "two"


def test_a_changed_setting_makes_its_stage_and_all_after_it_anew(driver: Driver) -> None:
    carried_out([stage("one", 1), stage("two", 2), stage("three", 3)], driver)
    changed = [stage("one", 1), stage("two", "else"), stage("three", 3)]
    assert carried_out(changed, driver) == [("one", True), ("two", False), ("three", False)]


def test_a_stage_whose_file_is_gone_is_made_anew(driver: Driver) -> None:
    parts = [stage("one", 1, gives=("one/made.json",)), stage("two", 2)]
    carried_out(parts, driver)
    absent = [stage("one", 1, gives=("one/other.json",)), stage("two", 2)]
    assert carried_out(absent, driver) == [("one", False), ("two", True)]


def test_a_finished_stage_that_has_more_to_do_does_it(driver: Driver) -> None:
    carried_out([stage("one", 1)], driver)
    assert carried_out([stage("one", 1, again=lambda driver: True)], driver) == [("one", False)]


def test_a_stage_that_fails_is_not_finished(driver: Driver) -> None:
    def fail(driver: Driver) -> None:
        raise KeyboardInterrupt

    broken = Stage("two", "two", lambda driver: [2], fail)
    with pytest.raises(KeyboardInterrupt):
        carried_out([stage("one", 1), broken], driver)
    assert carried_out([stage("one", 1), stage("two", 2)], driver) == [("one", True), ("two", False)]


@pytest.mark.parametrize(
    ("allocation", "ends", "expected"),
    [
        ("paper", (stages.ROUNDS, stages.FINAL), ["shards", "dense", "scan", "rounds", "final"]),
        ("uniform", (stages.ROUNDS, stages.FINAL), ["shards", "dense", "rounds", "final"]),
        ("uniform", (stages.SCAN,), ["shards", "dense", "scan"]),
    ],
)
def test_the_scan_is_a_stage_where_something_needs_it(
    tiny: Callable[..., Config], allocation: str, ends: tuple[Stage, ...], expected: list[str]
) -> None:
    config = tiny(**{"prune.allocation": allocation})
    assert [part.name for part in stages.up_to(config, *ends)] == expected
