"""Check pruning by magnitude against sorted magnitudes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sparsegpt import fractions, hypothesis_settings, random

from mixgpt.pruning.magnitude import magnitude_prune
from mixgpt.pruning.targets import Target


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_prune_zeroes_the_n_smallest_magnitudes_of_every_group(prunen, prunem, dtype):
    W = random(5, 16).to(dtype)
    before = W.clone()
    W_hat = magnitude_prune(W, Target(0.9, prunen, prunem))
    assert W_hat.dtype == dtype and torch.equal(W, before)
    for row, row_hat in zip(W.tolist(), W_hat.tolist(), strict=True):
        for left in range(0, 16, prunem):
            group, group_hat = row[left:left + prunem], row_hat[left:left + prunem]
            pairs = list(zip(group, group_hat, strict=True))
            assert all(w_hat in (0.0, w) for w, w_hat in pairs)
            assert sorted(abs(w) for w, w_hat in pairs if w_hat == 0) == sorted(map(abs, group))[:prunen]
