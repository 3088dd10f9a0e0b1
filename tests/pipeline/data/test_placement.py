"""Permutations, not processes: placement against hand-worked numbers and properties."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.base.seeding import generator
from pipeline.data import placement

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=6)


def whole_line(counts: list[int], seed: int, epoch: int) -> NDArray[np.int64]:
    line = placement.EpochLine(counts, seed, epoch)
    return line.part(0, len(line))


def test_lanes_are_equal_and_leave_the_tail_out():
    assert placement.lanes(11, 3) == [slice(0, 3), slice(3, 6), slice(6, 9)]


def test_owned_lanes_by_hand():
    assert [list(placement.owned(rank, 3, 8)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_steps_by_hand():
    # 100 samples in 4 lanes are 25 each; a batch of 12 takes 3 of each lane: 8 steps, one sample a lane is left
    assert placement.steps_per_epoch(100, 4, 12) == 8
    assert placement.steps_per_epoch(3, 4, 12) == 0


def test_resume_point_by_hand():
    order = np.array([1, 0, 3, 2, 4])
    assert [placement.resume_point(order, p) for p in range(6)] == [0, 0, 2, 2, 4, 5]


def test_stratified_by_hand():
    # 3 of 10 samples, classes of 6, 3 and 1: shares 1.8, 0.9, 0.3 -> 1, 0, 0 and the remainders go to 0.9 and 0.8
    labels = np.array([0] * 6 + [1] * 3 + [2])
    chosen = placement.stratified(labels, 3, generator(0, "x"))
    assert np.bincount(labels[chosen], minlength=3).tolist() == [2, 1, 0]
    assert chosen.tolist() == sorted(set(chosen.tolist()))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_stratified_is_exact_and_proportional(labels, data):
    array = np.array(labels)
    total = data.draw(st.integers(0, len(labels)))
    chosen = placement.stratified(array, total, generator(1, "y"))
    assert len(set(chosen.tolist())) == total
    for label, count in zip(*np.unique(array, return_counts=True), strict=True):
        assert abs((array[chosen] == label).sum() - total * count / len(labels)) < 1


@given(COUNTS, st.integers(0, 3), st.integers(0, 3))
def test_line_holds_each_sample_once_and_shards_stay_whole(counts, seed, epoch):
    line = whole_line(counts, seed, epoch)
    assert sorted(line.tolist()) == list(range(sum(counts)))
    jumps = int((np.diff(line) != 1).sum())
    assert jumps < max(1, sum(count > 0 for count in counts))


@given(COUNTS, st.integers(0, 3), st.data())
def test_a_part_of_the_line_is_cut_from_shards_laid_end_to_end(counts, epoch, data):
    starts = np.concatenate([[0], np.cumsum(counts)])
    order = generator(7, "shards", epoch).permutation(len(counts))
    laid = np.concatenate([np.arange(0), *(np.arange(starts[shard], starts[shard + 1]) for shard in order)])
    start = data.draw(st.integers(0, len(laid)))
    stop = data.draw(st.integers(start, len(laid)))
    line = placement.EpochLine(counts, 7, epoch)
    assert len(line) == len(laid)
    assert line.part(start, stop).tolist() == laid[start:stop].tolist()


@given(st.integers(0, 200), st.integers(1, 60), st.integers(0, 2**40))
def test_shift_is_a_permutation_within_its_bound(n, window, stream):
    order = placement.bounded_shift(n, window, stream)
    assert sorted(order.tolist()) == list(range(n))
    assert np.all(np.abs(order - np.arange(n)) < window)


@given(st.integers(1, 120), st.integers(1, 40), st.data())
def test_reader_from_the_resume_point_holds_less_than_the_window(n, window, data):
    order = placement.bounded_shift(n, window, 7)
    position = data.draw(st.integers(0, n))
    begin = placement.resume_point(order, position)
    assert set(order[position:].tolist()) <= set(range(begin, n))
    assert begin > position - window or begin == 0
    for p in range(position, n):  # the furthest input read so far, less what was given out
        assert order[: p + 1].max() - p < window


@settings(max_examples=50)
@given(COUNTS, st.integers(1, 6), st.integers(1, 5), st.integers(1, 30), st.integers(0, 2))
def test_any_world_size_makes_the_same_batches(counts, lanes, micro, window, epoch):
    batch, n = lanes * micro, sum(counts)
    steps = placement.steps_per_epoch(n, lanes, batch)
    whole = [
        placement.batch_indices(counts, 3, epoch, step, lanes=lanes, batch_size=batch, window=window).tolist()
        for step in range(steps)
    ]
    seen = [sample for step in whole for sample in step]
    assert len(seen) == len(set(seen)) == steps * batch
    assert set(seen) <= set(range(n))
    for world in range(1, lanes + 1):
        owned = [placement.owned(rank, world, lanes) for rank in range(world)]
        assert [lane for part in owned for lane in part] == list(range(lanes))
        for step in range(steps):
            union: list[int] = []
            for part in owned:
                for lane in placement.epoch_lanes(counts, 3, epoch, total=lanes, window=window, only=part):
                    union += lane.samples[step * micro : (step + 1) * micro].tolist()
            assert union == whole[step]


def test_each_lane_is_a_permutation_of_its_slice_of_the_line():
    counts = [7, 5, 9, 4]
    line = whole_line(counts, 2, 1)
    for cut, lane in zip(placement.lanes(25, 4), placement.epoch_lanes(counts, 2, 1, total=4, window=3), strict=True):
        assert lane.line.tolist() == line[cut].tolist()
        assert sorted(lane.samples.tolist()) == sorted(line[cut].tolist())


def test_epochs_differ_in_order_and_in_the_tail_left_out():
    counts = [10, 10, 10, 3]
    lines = [whole_line(counts, 0, epoch) for epoch in range(12)]
    assert len({tuple(line.tolist()) for line in lines}) > 6
    assert len({tuple(sorted(line[32:].tolist())) for line in lines}) > 2
    assert np.array_equal(lines[5], whole_line(counts, 0, 5))
    assert not np.array_equal(
        placement.epoch_lanes(counts, 0, 0, total=1, window=30)[0].order,
        placement.epoch_lanes(counts, 1, 0, total=1, window=30)[0].order,
    )


def test_labels_are_mixed_when_the_window_is_wide_and_not_when_it_is_one():
    labels = np.repeat(np.arange(10), 100)  # ten shards sorted by class
    wide = placement.epoch_lanes([100] * 10, 0, 0, total=1, window=20_000)[0].samples
    narrow = placement.epoch_lanes([100] * 10, 0, 0, total=1, window=1)[0].samples
    kinds = [np.mean([len(set(labels[order[i : i + 20]])) for i in range(0, 1000, 20)]) for order in (wide, narrow)]
    expected = 10 * (1 - 0.9**20)  # classes among 20 random samples: 8.8
    assert abs(kinds[0] - expected) < 0.4
    assert kinds[1] == 1
    assert placement.same_label_neighbours(labels[narrow]) > 0.98
    assert placement.same_label_neighbours(labels[wide]) < 0.15
