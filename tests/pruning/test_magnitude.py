"""Check pruning by magnitude against sorted magnitudes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sparsegpt import fractions, hypothesis_settings, random

from mixgpt.pruning.layerwise import _by_magnitude, magnitude_prune
from mixgpt.pruning.targets import Target
from mixgpt.quant import Scheme


@hypothesis_settings
@given(rows=st.integers(1, 8), columns=st.integers(1, 20), sparsity=fractions, seed=st.integers(0, 1000),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_magnitude_prune_zeroes_the_smallest_magnitudes_and_keeps_the_rest(rows, columns, sparsity, seed, dtype):
    W = random(rows, columns, seed=seed).to(dtype)
    before = W.clone()
    W_hat = magnitude_prune(W, Target(sparsity))
    assert W_hat.dtype == dtype and torch.equal(W, before)
    kept, count = W_hat != 0, round(sparsity * (rows * columns))
    assert torch.equal(W_hat[kept], W[kept])
    assert sorted(W[~kept].abs().tolist()) == sorted(W.abs().flatten().tolist())[:count]


@pytest.mark.parametrize("prunen, prunem", [(2, 4), (4, 8), (1, 2), (0, 4), (4, 4)])
def test_magnitude_prune_zeroes_the_n_smallest_magnitudes_of_every_group(prunen, prunem):
    W = random(5, 16)
    W_hat = magnitude_prune(W, Target(0.9, prunen, prunem))
    for group, group_hat in zip(W.view(-1, prunem), W_hat.view(-1, prunem), strict=True):
        assert torch.equal(group_hat[group_hat != 0], group[group_hat != 0])
        assert sorted(group[group_hat == 0].abs().tolist()) == sorted(group.abs().tolist())[:prunen]


@pytest.mark.parametrize("scheme", [Scheme(2), Scheme(3, 8, sym=True), Scheme(4)])
def test_magnitude_and_rounding_never_leave_fewer_zeros_than_asked(scheme):
    for seed in range(20):
        W = random(7, 32, seed=seed).float()
        rounded, grid = _by_magnitude(W, Target(0.5), scheme)
        assert (rounded == 0).sum() >= 112
        assert torch.equal(grid.weights(grid.codes(rounded)), rounded)
