import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.prune.masks import Applier, check, digest, pack_bits, top_mask, unpack_bits


def test_the_highest_are_kept() -> None:
    scores = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    mask = top_mask(scores, torch.ones(2, 2, dtype=torch.bool), 2)
    assert mask.tolist() == [[False, True], [True, False]]


def test_ties_go_to_the_lower_index() -> None:
    mask = top_mask(torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.ones(4, dtype=torch.bool), 3)
    assert mask.tolist() == [True, True, True, False]


def test_the_dead_stay_dead() -> None:
    alive = torch.tensor([False, True, True])
    assert top_mask(torch.tensor([9.0, 1.0, 2.0]), alive, 1).tolist() == [False, False, True]


@given(st.lists(st.tuples(st.integers(-2, 3), st.booleans()), min_size=1, max_size=40), st.data())
def test_against_a_plain_sort(pairs: list[tuple[int, bool]], data: st.DataObject) -> None:
    scores = torch.tensor([float(score) for score, _ in pairs])
    alive = torch.tensor([living for _, living in pairs])
    keep = data.draw(st.integers(0, int(alive.sum())))
    ranked = sorted((index for index, (_, living) in enumerate(pairs) if living), key=lambda i: (-pairs[i][0], i))
    wanted = [index in ranked[:keep] for index in range(len(pairs))]
    before = scores.clone()
    assert top_mask(scores, alive, keep).tolist() == wanted
    assert torch.equal(scores, before)


def test_a_channels_last_tensor_counts_in_logical_order() -> None:
    scores = torch.arange(16.0).reshape(1, 4, 2, 2).to(memory_format=torch.channels_last)
    mask = top_mask(scores, torch.ones(1, 4, 2, 2, dtype=torch.bool), 4)
    assert mask.flatten().tolist() == [False] * 12 + [True] * 4


def test_keeping_all_gives_a_copy() -> None:
    alive = torch.tensor([True, True])
    mask = top_mask(torch.tensor([1.0, 2.0]), alive, 2)
    mask[0] = False
    assert alive.all()


def test_bits_by_hand() -> None:
    masks = {"a": torch.tensor([True, False, False, True]), "b": torch.tensor([[False], [True]])}
    assert pack_bits(masks) == bytes([0b1001, 0b10])
    assert unpack_bits(bytes([0b1001, 0b10]), {"a": (4,), "b": (2, 1)})["b"].tolist() == [[False], [True]]


@given(st.lists(st.lists(st.booleans(), max_size=30), max_size=4))
def test_packing_round_trip(rows: list[list[bool]]) -> None:
    masks = {str(i): torch.tensor(row, dtype=torch.bool) for i, row in enumerate(rows)}
    found = unpack_bits(pack_bits(masks), {name: tuple(mask.shape) for name, mask in masks.items()})
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("size", [0, 1, 3])
def test_packed_masks_of_the_wrong_length(size: int) -> None:
    with pytest.raises(UserError, match=f"{size} bytes"):
        unpack_bits(bytes(size), {"a": (9,)})


def test_digest_is_stable() -> None:
    # Written down once: another machine, another day, the same masks give the same number.
    assert digest({"w": torch.tensor([True, False])}) == 8427695119241614120


def test_digest_sees_bits_names_and_shapes_but_not_order() -> None:
    a, b = torch.tensor([True, False]), torch.tensor([[True, True]])
    reference = digest({"a": a, "b": b})
    assert reference == digest({"b": b, "a": a})
    others = [{"a": ~a, "b": b}, {"a": a, "c": b}, {"a": a, "b": b.T}, {"a": a}, {"b": a, "a": b}]
    assert reference not in {digest(other) for other in others}
    assert 0 <= reference < 2**63


def test_check_names_tensor_and_problem() -> None:
    mask = torch.tensor([True, False, True, False])
    good = torch.tensor([1.0, -0.0, 0.0, 0.0])
    assert check({"w": good}, {"w": mask}, {"w": 2}) == []
    assert check({"w": torch.tensor([1.0, 1e-30, 0, 0])}, {"w": mask}, {"w": 2}) == ["w: 1 pruned weights are not 0"]
    assert check({"w": torch.tensor([1.0, torch.nan, 0, 0])}, {"w": mask}, {"w": 2}) == [
        "w: 1 pruned weights are not 0"
    ]
    assert check({"w": good}, {"w": mask}, {"w": 3}) == ["w: the mask keeps 2 weights, planned were 3"]
    assert check({"w": good}, {}, {"w": 3}) == ["w: has no mask"]
    assert check({"w": good[:2]}, {"w": mask}, {"w": 2}) == ["w: weight is (2,) but its mask (4,)"]


def test_applier_masks_weights_that_training_moved() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    dense = torch.nn.Parameter(torch.tensor([5.0]))
    applier = Applier([weight, dense], [torch.tensor([True, False, False]), torch.tensor([True])])
    applier.apply()
    assert weight.tolist() == [1.0, 0.0, 0.0]
    (weight.sum() * 2).backward()
    torch.optim.SGD([weight], lr=1.0).step()
    assert weight.tolist() == [-1.0, -2.0, -2.0]
    applier.apply()
    assert weight.tolist() == [-1.0, 0.0, 0.0]
    assert dense.item() == 5.0


def test_applier_zeroes_momentum_and_takes_none() -> None:
    masks = [torch.tensor([True, False]), torch.tensor([False, True])]
    applier = Applier([torch.ones(2), torch.ones(2)], masks)
    momentum = torch.tensor([3.0, 4.0])
    applier.zero([momentum, None])
    assert momentum.tolist() == [3.0, 0.0]


def test_clean_leaves_plus_zero_whatever_was_there() -> None:
    weight = torch.tensor([-1.0, torch.nan, -torch.inf, 7.0])
    applier = Applier([weight], [torch.tensor([False, False, False, True])])
    applier.apply()
    assert np.signbit(weight[0].item())
    applier.clean()
    assert weight.numpy().tobytes() == np.array([0, 0, 0, 7], dtype=np.float32).tobytes()


def test_applier_keeps_dtype_and_memory_format() -> None:
    weight = torch.ones(2, 3, 2, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    mask = torch.arange(24).reshape(2, 3, 2, 2) % 2 == 0
    Applier([weight], [mask]).apply()
    assert torch.equal(weight != 0, mask)
    assert weight.is_contiguous(memory_format=torch.channels_last)
