"""A run is held to the data that it was made from, also one that an older program began."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import few_samples
import numpy as np
import pytest
from tiny_run import ALONE

from pipeline import stages, storage
from pipeline.base.errors import UserError
from pipeline.data import shards
from pipeline.data.manifest import Manifest
from pipeline.local import LocalEngine
from pipeline.rounds import same_data
from pipeline.run import records
from pipeline.run.events import unheard
from pipeline.run.records import DataFacts, DenseMetrics, Evaluation
from pipeline.run.state import Run, open_run
from pipeline.settings.config import Config
from pipeline.stages import Driver
from pipeline.train import session

ANSWERS = Evaluation(0.9, None, 0.1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the digits, and others of the same images."""
    root = tmp_path_factory.mktemp("shards")
    for seed in (0, 1):
        shards.build(Config.model_validate({"name": "x"}).data, seed, str(root / str(seed)))
    return root


@pytest.fixture
def driver(tiny: Callable[..., Config], built: Path, tmp_path: Path) -> Iterator[Driver]:
    """Of a run on shards in place, whose stage `shards` is finished and that has trained nothing yet."""
    root = tmp_path / "shards"
    shutil.copytree(built / "0", root)
    config = tiny(**{"data.source": "shards", "data.root": str(root)})
    with open_run(config) as run:
        made = Driver(config, LocalEngine(ALONE), run, unheard)
        stages.carry_out([stages.SHARDS], made)
        yield made


def trained(run: Run, data: str | None = None) -> None:
    run.commit(DenseMetrics(ANSWERS, (), 1.0, data=data), "dense", "metrics.json")


def swap(driver: Driver, built: Path) -> None:
    root = Path(str(driver.config.data.root))
    shutil.rmtree(root)
    shutil.copytree(built / "1", root)


def settle(driver: Driver) -> None:
    stages.carry_out([], driver)


def manifest_of(driver: Driver) -> Manifest:
    return shards.load_manifest(str(driver.config.data.root))


Change = Callable[[Manifest], dict[str, Any]]  # the fields that it changes


def edit_manifest(driver: Driver, change: Change) -> None:
    manifest = manifest_of(driver)
    few_samples.rewrite(Path(str(driver.config.data.root)), manifest, **change(manifest))


def other_checksum(manifest: Manifest) -> dict[str, Any]:
    (shard, rows), *rest = manifest.splits["test"].described()
    return {"splits": {"test": [(shard._replace(sha256="0" * 64), rows), *rest]}}


def one_sample_less(manifest: Manifest) -> dict[str, Any]:
    shard, rows = next(manifest.splits["train"].described())
    return {"splits": {"train": [(shard._replace(skipped=1), replace(rows, skipped=np.array([3])))]}}


@pytest.mark.parametrize(
    "change",
    [
        other_checksum,
        lambda _: {"made_from": "another"},
        lambda _: {"num_classes": 11},
        one_sample_less,
    ],
)
def test_other_checksums_or_another_origin_are_other_data(driver: Driver, change: Change) -> None:
    trained(driver.run)
    settle(driver)
    before, root = manifest_of(driver), Path(str(driver.config.data.root))
    shutil.copytree(root, root.with_name("before"))
    edit_manifest(driver, change)
    now = manifest_of(driver)
    message = rf"the data were {before.identity} \(1,293 train, 144 val, 360 test\), and are {now.identity} \("
    with pytest.raises(UserError, match=message):
        settle(driver)
    with pytest.raises(UserError, match=message):  # what a worker does that starts again
        session.open_session(driver.config, ALONE, driver.run, unheard)
    shutil.rmtree(root)
    root.with_name("before").rename(root)
    settle(driver)


def test_checksums_of_images_that_older_manifests_lack_make_no_other_data(driver: Driver) -> None:
    before = manifest_of(driver).identity
    edit_manifest(driver, lambda made: {
        "splits": {
            split: [(shard, replace(rows, crc32=None)) for shard, rows in parts.described()]
            for split, parts in made.splits.items()
        }
    })  # fmt: skip
    assert manifest_of(driver).identity == before


def test_a_run_that_has_trained_nothing_takes_the_new_shards(driver: Driver, built: Path) -> None:
    swap(driver, built)
    stages.carry_out([stages.SHARDS], driver)
    assert driver.run.load(DataFacts, "data.json").data == manifest_of(driver).identity
    assert driver.run.has("shards", "finished.json")


def test_a_part_that_was_made_from_other_data_is_named(driver: Driver) -> None:
    for name, kind in (("dense/metrics.json", "the dense network"), ("final/test.json", "the test result")):
        made = DenseMetrics(ANSWERS, (), 1.0, data="feed") if "dense" in name else None
        driver.run.commit(made or records.TestMetrics(1, ANSWERS, ANSWERS, data="feed"), name)
        with pytest.raises(UserError, match=rf"holds other shards than {kind} in .* the data were feed, and are "):
            settle(driver)
        storage.remove(driver.run.path(name))
    settle(driver)


def forget(run: Run) -> None:
    """As an older program left it."""
    facts = run.read("data.json")
    del facts["data"]
    run.commit(facts, "data.json")


def test_an_older_run_opens_and_is_held_to_its_data_from_then_on(driver: Driver) -> None:
    trained(driver.run)
    forget(driver.run)
    settle(driver)
    assert driver.run.load(DataFacts, "data.json").data == manifest_of(driver).identity
    edit_manifest(driver, other_checksum)
    with pytest.raises(UserError, match="put the old shards back, or use another name"):
        settle(driver)


def test_an_older_run_whose_shards_have_another_origin_is_refused(driver: Driver, built: Path) -> None:
    trained(driver.run)
    forget(driver.run)
    swap(driver, built)
    with pytest.raises(UserError, match=r"its manifest has another made_from\): put the old shards back"):
        settle(driver)
    assert "data" not in json.loads(Path(driver.run.path("data.json")).read_text())


def test_a_run_whose_shards_were_taken_away_is_left_alone(driver: Driver) -> None:
    trained(driver.run)
    shutil.rmtree(str(driver.config.data.root))
    same_data.settle(driver.config, driver.run, lambda: "unused")
