"""Check the smallest scores against sorted lists."""

import itertools

import makebelieve
import pytest
import torch
from test_sparsegpt import random

from mixgpt.kernels.selection import smallest, smallest_in_groups


@pytest.mark.parametrize("m", [1, 2, 4, 7, 40, 70])
def test_the_first_of_the_sorted_scores_of_each_group_are_marked(m):
    scores, counts = random(9, m, 3).round(), [0, 1, m]  # many ties
    mask = smallest_in_groups(scores, torch.tensor(counts))
    for group, (row, n) in itertools.product(range(9), enumerate(counts)):
        order = sorted(range(m), key=scores[group, :, row].tolist().__getitem__)
        assert mask[group, :, row].nonzero().flatten().tolist() == sorted(order[:n])
    assert torch.equal(smallest_in_groups(scores, 1)[:, :, 1], mask[:, :, 1])


def test_a_gpu_marks_the_first_of_equal_scores_and_takes_counts_that_lie_on_it():
    scores = torch.tensor([[3.0, 1, 1, 0], [2, 0, 1, 1]])
    with makebelieve.Gpu() as gpu:
        on_gpu, counts = scores.to("cuda:0"), [torch.tensor(k, device="cuda:0") for k in (4, -1)]
        before = gpu.synchronisations.copy()
        masks = smallest([on_gpu] * 3, [4, *counts])
        assert gpu.synchronisations == before
        first, second, none = (mask.cpu() for mask in masks)
    expected, = smallest([scores], [4])
    assert torch.equal(first, expected) and torch.equal(second, expected) and not none.any()
    assert expected.tolist() == [[False, True, True, True], [False, True, False, False]]
