"""Check the sparse format against numpy.packbits, counted bits, and the matrices that went in, bit for bit."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quant import random_grid

from mixgpt.checkpoints.packing import decode, encode, pack, unpack

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
hypothesis_settings = settings(max_examples=60, deadline=None, derandomize=True, database=None)
dtypes, all_wbits, seeds = st.sampled_from(list(INTEGERS)), st.sampled_from([2, 3, 4, 8]), st.integers(0, 1000)
sparsities = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def some_codes(count, bits, seed=0):
    return torch.randint(0, 2 ** bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_bits(rows, columns, dtype, sparsity, seed):
    """Return a matrix of any bit patterns, NaN and −0 included, of which about `sparsity` are 0."""
    generator = torch.Generator().manual_seed(seed)
    integers, info = INTEGERS[dtype], torch.iinfo(INTEGERS[dtype])
    W = torch.randint(info.min, info.max + 1, (rows, columns), dtype=integers, generator=generator)
    W.masked_fill_(torch.rand(rows, columns, generator=generator) < sparsity, 0)
    return W.masked_fill(torch.rand(rows, columns, generator=generator) < 0.1, info.min).view(dtype)


def on_grid(rows, groups, width, wbits, dtype, sym, permuted, sparsity, seed):
    """Return a matrix (rows, groups · width), of which about `sparsity` are 0, and its Grid."""
    grid = random_grid(rows, groups, width, wbits, dtype, sym, permuted, seed)
    steps = some_codes(rows * len(grid.group), wbits, seed).view(rows, -1) - grid.zero[:, grid.group].float()
    steps[torch.rand(steps.shape, generator=torch.Generator().manual_seed(seed + 1)) < sparsity] = 0
    return (steps * grid.scale[:, grid.group].float()).to(dtype), grid


def same_bits(first, second):
    integers = INTEGERS[first.dtype]
    return first.dtype == second.dtype and torch.equal(first.view(integers), second.view(integers))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_codes_are_packed_as_numpy_packs_their_bits_and_unpacked_again(bits, count):
    codes = some_codes(count, bits)
    each = np.array([code >> k & 1 for code in codes.tolist() for k in range(bits)], dtype=np.uint8)
    expected = np.packbits(each, bitorder="little")
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.tolist() == expected.tolist()
    assert packed.shape == (-(-count * bits // 8),)
    assert unpack(packed, bits, count).dtype == torch.uint8 and torch.equal(unpack(packed, bits, count), codes)


@hypothesis_settings
@given(rows=st.integers(1, 9), columns=st.integers(1, 20), dtype=dtypes, sparsity=sparsities, seed=seeds)
def test_any_matrix_comes_back_bit_for_bit_and_takes_no_more_than_its_values(rows, columns, dtype, sparsity, seed):
    W = random_bits(rows, columns, dtype, sparsity, seed)
    before = W.clone()
    parts, description = encode(W)
    assert same_bits(decode(parts, json.loads(json.dumps(description))), W) and same_bits(W, before)
    assert sum(tensor.nbytes for tensor in parts.values()) <= W.nbytes
    assert description["parts"] == sorted(parts) and "wbits" not in description


@hypothesis_settings
@given(rows=st.integers(1, 5), groups=st.integers(1, 3), width=st.sampled_from([1, 5, 8]), wbits=all_wbits,
       dtype=st.sampled_from([torch.float32, torch.float16]), sym=st.booleans(), permuted=st.booleans(),
       sparsity=sparsities, seed=seeds)
def test_a_matrix_on_a_grid_comes_back_bit_for_bit(rows, groups, width, wbits, dtype, sym, permuted, sparsity, seed):
    W, grid = on_grid(rows, groups, width, wbits, dtype, sym, permuted, sparsity, seed)
    parts, description = encode(W, grid)
    assert same_bits(decode(parts, json.loads(json.dumps(description))), W)
    assert description["parts"] == sorted(parts) and description["wbits"] == wbits
