"""A network's answers: counted by hand, and what a run keeps of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from pipeline.base.stats import wilson
from pipeline.task.answers import Answers, Marks, save_marks

# As `judge` has them: right, right in 5, right among the classes present, loss, valid; the last could not be read.
ROWS = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 1], [1, 0, 1, 1], [0.5, 1.0, 3.0, 9.0], [1, 1, 1, 0]], dtype=torch.float64)


def test_answers_are_counted_over_the_readable_samples() -> None:
    found = Answers.of(ROWS, present=True).metrics()
    assert (found.top1, found.top5, found.top1_present, found.loss) == (1 / 3, 2 / 3, 2 / 3, 1.5)
    assert Answers.of(ROWS, present=False).metrics().top1_present is None
    figures = Answers.of(ROWS, present=False).figures()
    assert (figures.top1, figures.loss, figures.samples) == (1 / 3, 1.5, 3)
    assert (figures.low, figures.high) == wilson(1, 3)
    assert Answers.of(ROWS, present=True).first(2).metrics().top1_present == 0.5


def test_marks_come_back_from_a_file_of_one_network_and_of_several() -> None:
    dense, pruned = Answers.of(ROWS, present=False), Answers.of(torch.cat([1 - ROWS[:1], ROWS[1:]]), present=False)
    alone = Marks.load(dense.save())
    assert alone.right.tolist() == [True, False, False, True]
    assert alone.valid.tolist() == [True, True, True, False]
    both = save_marks({"dense": dense, "pruned": pruned})
    assert Marks.load(both, "dense").right.tolist() == dense.right.tolist()
    assert Marks.load(both, "pruned").right.tolist() == pruned.right.tolist()
    with pytest.raises(KeyError):
        Marks.load(both, "dense_control")
    # The names that files of earlier runs have.
    assert np.load(io.BytesIO(dense.save())).files == ["right", "valid"]
    assert np.load(io.BytesIO(both)).files == ["dense_right", "valid", "pruned_right"]
