"""The scan of a tensor against a straightforward one: a copy of the network for each level, all samples."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scan_records import level as known_level
from scan_records import scan_of
from torch import nn
from torch.nn import functional as F

from pipeline.base.stats import tango
from pipeline.data.loader import Batch
from pipeline.prune.masks import nested, top_mask
from pipeline.run.records import Level
from pipeline.scan import racing
from pipeline.scan.inputs import shuffled
from pipeline.scan.levels import scan_part
from pipeline.scan.suffix import Suffix
from pipeline.settings.config import Config, parse_config
from pipeline.task.answers import Answers

CPU = torch.device("cpu")
SAMPLES = 420


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(eval_precision: str = "fp32", **scan: Any) -> Config:
    data = {"source": "digits", "size": 8, "eval_batch": 40, "mean": [0.5], "std": [0.3]}
    settings = {"data": data, "scan": {"levels": [0.5, 0.2, 0.05], **scan}, "eval_precision": eval_precision}
    return parse_config({"name": "scan", **settings})


def problem() -> tuple[nn.Module, list[Batch]]:
    """A small network, and images labelled with its own answers, a tenth of them wrong, sorted by class."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(216, 24), nn.ReLU(), nn.Linear(24, 5)
    ).eval()
    images = torch.randint(0, 256, (SAMPLES, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        logits = model((images.float() / 255 - 0.5) / 0.3)
        labels = (logits - logits.mean(0)).argmax(1)
        model[5].bias -= logits.mean(0)
    labels[::10] = (labels[::10] + 1) % 5
    order = labels.argsort()
    weights = torch.ones(SAMPLES)
    weights[7] = 0  # an image that could not be read
    parts = (images[order], labels[order], weights, torch.arange(SAMPLES))
    return model, [Batch(*made) for made in zip(*(part.split(40) for part in parts), strict=True)]


def by_hand(
    model: nn.Module, name: str, keep: int, batches: list[Batch], bf16: bool = False
) -> tuple[list[bool], list[float]]:
    """Right or wrong and the loss of each readable sample, with so many weights kept."""
    copied = copy.deepcopy(model)
    weight = dict(copied.named_parameters())[name]
    mask = top_mask(weight.detach().abs(), torch.ones_like(weight, dtype=torch.bool), keep)
    weight.data.mul_(mask)
    right: list[bool] = []
    loss: list[float] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for batch in batches:
            logits = copied(((batch.images.float() / 255) - torch.tensor([0.5])) / torch.tensor([0.3])).float()
            good = batch.weights > 0
            right += (logits.argmax(1) == batch.labels)[good].tolist()
            loss += F.cross_entropy(logits, batch.labels, reduction="none")[good].tolist()
    return right, loss


def run(
    model: nn.Module, name: str, batches: list[Batch], config: Config, known: Sequence[Level] = (), **more: Any
) -> list[Level]:
    given = scan_of(config, CPU, model, batches, **more)
    return list(scan_part(given, given.answers(), name, known))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_grid_has_the_numbers_of_a_straightforward_scan(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = precision == "bf16"
    model, batches = problem()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("pipeline.scan.levels.CHUNK_BYTES", 300_000)  # several chunks, of several batches
    for name in ("0.weight", "3.weight", "5.weight"):
        right, loss = by_hand(model, name, dict(model.named_parameters())[name].numel(), batches, bf16)
        levels = run(model, name, batches, config(precision))
        assert [level.density for level in levels] == [0.5, 0.2, 0.05]
        for level in levels:
            pruned_right, pruned_loss = by_hand(model, name, level.kept, batches, bf16)
            assert level.samples == SAMPLES - 1
            assert level.top1 == sum(pruned_right) / (SAMPLES - 1)
            assert level.loss == pytest.approx(np.mean(pruned_loss), rel=1e-12)
            assert level.drop == pytest.approx((sum(right) - sum(pruned_right)) / (SAMPLES - 1), abs=1e-12)
            assert level.rise == pytest.approx(np.mean(pruned_loss) - np.mean(loss), abs=1e-9)
            assert level.drop_low < level.drop < level.drop_high
            assert level.low < level.top1 < level.high
            assert level.rise_low is not None
            assert level.rise_low < level.rise
            assert level.method == "fx"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_levels_that_are_known_are_not_measured_again() -> None:
    model, batches = problem()
    levels = run(model, "3.weight", batches, config(), known=[known_level(0.2, drop=0.1)])
    assert [level.density for level in levels] == [0.5, 0.05]


def test_racing_stops_early_on_the_first_samples_of_one_order_for_all_levels() -> None:
    """What is left of the levels: each is decided at its look, by the samples up to it and no others."""
    model, batches = problem()
    given = config(interval=0.12)
    mixed = shuffled(batches, SAMPLES, 40, seed=1)
    looks = racing.looks(SAMPLES, racing=True)
    dense = scan_of(given, CPU, model, mixed).answers()
    z = racing.critical(len(looks))
    levels = run(model, "3.weight", mixed, given)
    assert min(level.samples for level in levels) < SAMPLES - 1
    for level in levels:
        right, _ = by_hand(model, "3.weight", level.kept, mixed)
        alone = dense.right[dense.valid][: level.samples]
        drop = (int(alone.sum()) - sum(right[: level.samples])) / level.samples
        assert level.drop == pytest.approx(drop, abs=1e-12)
        assert level.top1 == pytest.approx(dense.figures().top1 - drop, abs=1e-12)
        last = level.samples >= SAMPLES - 1
        assert last or racing.decided(level.drop_low, level.drop_high, dense.figures().top1, given.scan)
        wide = tango(*_discordant(alone, right[: level.samples]), level.samples, z)
        assert (level.drop_low, level.drop_high) == wide


def _discordant(before: Any, after: list[bool]) -> tuple[int, int]:
    pairs = list(zip(before.tolist(), after, strict=True))
    return sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)


def test_adaptive_levels_lie_where_the_curve_bends() -> None:
    model, batches = problem()
    levels = run(model, "3.weight", batches, config(mode="adaptive", tolerance=0.08, max_levels=8))
    assert [level.density for level in levels[:3]] == [0.5, 0.2, 0.05]
    assert 3 < len(levels) <= 8
    curve = sorted([(1.0, 0.0), *((level.density, level.drop) for level in levels)])
    steps = [abs(b[1] - a[1]) for a, b in itertools.pairwise(curve)]
    assert len(levels) == 8 or max(steps) <= 0.08
    again = run(model, "3.weight", batches, config(levels=sorted((lv.density for lv in levels), reverse=True)))
    assert {lv.density: (lv.top1, lv.loss) for lv in again} == {lv.density: (lv.top1, lv.loss) for lv in levels}


def test_masks_of_a_round_stay_applied() -> None:
    """Of 60 weights that are alive a density of 0.5 keeps the 30 largest; the dead stay dead."""
    model, batches = problem()
    weight = model[5].weight
    alive = top_mask(weight.detach().abs(), torch.ones_like(weight, dtype=torch.bool), 60)
    weight.data.mul_(alive)
    level = run(model, "5.weight", batches, config(levels=[0.5]), alive={"5.weight": alive})[0]
    assert (level.kept, level.absolute) == (30, 30 / 120)
    assert level.top1 == run(model, "5.weight", batches, config(levels=[0.25]))[0].top1
    assert torch.equal(weight != 0, alive)


def test_an_error_puts_the_tensor_back() -> None:
    model, batches = problem()
    before = model[3].weight.detach().clone()
    dense = scan_of(config(), CPU, model, batches).answers()
    broken = Batch(batches[1].images[:, :, :4], batches[1].labels, batches[1].weights, batches[1].indices)
    with pytest.raises(RuntimeError):
        list(scan_part(scan_of(config(), CPU, model, [batches[0], broken]), dense, "3.weight"))
    assert torch.equal(model[3].weight, before)


def test_shuffled_batches_hold_every_sample_once_and_end_at_the_looks() -> None:
    _, batches = problem()
    mixed = shuffled(iter(batches), SAMPLES, 40, seed=1)
    indices = torch.cat([batch.indices for batch in mixed])
    assert sorted(indices.tolist()) == list(range(SAMPLES))
    ends = np.cumsum([len(batch.labels) for batch in mixed])
    assert set(racing.looks(SAMPLES, racing=True)) <= set(ends.tolist())
    assert max(len(batch.labels) for batch in mixed) == 40
    images, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])
    assert torch.equal(torch.cat([b.images for b in mixed]), images[indices])
    assert torch.equal(torch.cat([b.labels for b in mixed]), labels[indices])
    assert len(set(mixed[0].labels.tolist())) > 3  # sorted by class before
    again = shuffled(batches, SAMPLES, 40, seed=1)
    assert torch.equal(torch.cat([b.indices for b in again]), indices)


def test_figures_do_not_depend_on_the_order_of_the_samples() -> None:
    draw = np.random.default_rng(0)
    loss = draw.exponential(size=1000) * 10.0 ** draw.integers(-8, 8, 1000)
    right, valid = draw.random(1000) < 0.7, draw.random(1000) < 0.9

    def answers(order: Any) -> Answers:
        mixed = right[order]
        return Answers(right=mixed, right5=mixed, right_present=None, loss=loss[order], valid=valid[order])

    assert answers(np.arange(1000)).figures() == answers(draw.permutation(1000)).figures()


@pytest.mark.parametrize("seed", range(5))
def test_nested_counts_the_masks_that_keep_a_weight(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 6, (4, 9), generator=draw).float()  # ties everywhere
    alive = torch.rand(4, 9, generator=draw) < 0.8
    keeps = sorted({1, int(alive.sum()), *torch.randint(1, int(alive.sum()), (4,), generator=draw).tolist()})[::-1]
    counts = nested(values, alive, keeps)
    for i, keep in enumerate(keeps):
        assert torch.equal(counts > i, top_mask(values, alive, keep))


def test_calibrated_levels_share_what_comes_before_with_its_new_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms before the tensor get new statistics too: what is shared must be computed with these."""
    _, batches = problem()
    torch.manual_seed(1)
    parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(64, 5)).eval()
    before = copy.deepcopy(model.state_dict())
    found = run(model, "3.weight", batches, config(), calibration=batches[:3])
    plain = run(model, "3.weight", batches, config())
    monkeypatch.setattr("pipeline.scan.suffix.choose", lambda model, *_: Suffix(model))
    whole = run(model, "3.weight", batches, config(), calibration=batches[:3])
    assert [replace(level, method="whole") for level in found] == whole
    assert [level.method for level in found] == ["fx"] * 3
    assert found[0].loss != plain[0].loss
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
