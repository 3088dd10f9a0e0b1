"""What trials of the scan are given; no Ray is started."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluster import sweep
from pipeline import stages
from pipeline.calibrate.statistics import statistics_for
from pipeline.local import LocalEngine
from pipeline.prune import criteria
from pipeline.prune.masks import top_mask
from pipeline.run.events import unheard
from pipeline.run.state import open_run
from pipeline.scan import alone, scan
from pipeline.scan.inputs import scan_inputs
from pipeline.settings.config import Config
from pipeline.train.session import open_session
from pipeline.train.world import World, configure_process

ALONE = World(0, 1, torch.device("cpu"))


def test_trials_prune_by_the_statistics_that_a_scan_measures_once(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"prune.criterion": "taylor", "prune.statistics_samples": 100, "dense.epochs": 1})
    configure_process(config.threads)
    with open_run(config) as here:
        stages.carry_out([stages.SHARDS, stages.DENSE], stages.Driver(config, LocalEngine(ALONE), here, unheard))
        given = sweep.trial_inputs(sweep.shared_inputs(config, here, scan.DENSE))
        session = open_session(config, ALONE, here, unheard)
        expected = scan_inputs(session, scan.DENSE).statistics
    assert list(given.statistics) == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert all(torch.equal(statistic, given.statistics[name]) for name, statistic in expected.items())
    again = statistics_for(session, given.model, [*expected])
    assert all(torch.equal(statistic, again[name]) for name, statistic in expected.items())

    tensor = alone.Alone(given, "fc3.weight")
    name = "fc3.weight"
    tensor.plan([0.5])
    ranking = criteria.scores("taylor", tensor.dense, 0, expected)["fc3.weight"]
    assert torch.equal(tensor.steps[name] > 0, top_mask(ranking, tensor.alive, 500))
    assert not torch.equal(tensor.steps[name] > 0, top_mask(tensor.dense[name].abs(), tensor.alive, 500))
