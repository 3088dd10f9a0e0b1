"""Weights that share values, by hand."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.train.tied import Sharing, Tied, put

# places 0, 2 and 5 are one centroid's, place 3 is another's; 1 and 4 are pruned
SHARING = Sharing(torch.tensor([0, 2, 5, 3]), torch.tensor([3, 1]))


def test_each_weight_gets_the_value_of_its_centroid() -> None:
    weight = torch.full((2, 3), 9.0)
    put(weight, SHARING, torch.tensor([0.5, -2.0]))
    assert weight.tolist() == [[0.5, 0.0, 0.5], [-2.0, 0.0, 0.5]]


def test_a_centroids_gradient_is_the_sum_of_its_weights_gradients_over_their_number() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.tensor([[1.0, 50.0, 2.0], [7.0, 60.0, 6.0]])
    Tied({"w": weight}, {"w": SHARING}).gather()
    assert weight.grad.tolist() == [[3.0, 0.0, 3.0], [7.0, 0.0, 3.0]]


def test_a_step_moves_all_weights_of_a_centroid_alike() -> None:
    weight = nn.Parameter(torch.tensor([[0.5, 0.0, 0.5], [-2.0, 0.0, 0.5]]))
    tied = Tied({"w": weight}, {"w": SHARING})
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    for _ in range(3):
        weight.grad = torch.randn(2, 3)
        tied.gather()
        optimizer.step()
        tied.tie()
        assert weight[0, 0] == weight[0, 2] == weight[1, 2]
    assert weight[0, 0] != 0.5


def test_ties_are_by_the_order_of_elements_whatever_the_memory_format() -> None:
    weight = nn.Parameter(torch.arange(5.0, 29.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last))
    sharing = Sharing(torch.tensor([0, 1, 23]), torch.tensor([3]))
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 0, 0, 1] = 3.0
    tied = Tied({"w": weight}, {"w": sharing})
    tied.gather()
    tied.tie()
    assert weight.grad.reshape(-1)[[0, 1, 2, 23]].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert weight.detach().reshape(-1)[[0, 1, 2, 23]].tolist() == [5.0, 5.0, 0.0, 5.0]
    assert weight.is_contiguous(memory_format=torch.channels_last)
