"""Check grids and rounding against plain Python: one number at a time, exhaustive search over all codes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixgpt.pruning.layerwise import magnitude_prune
from mixgpt.pruning.targets import Target
from mixgpt.quant import CODEBOOKS, SHRINKS, Codebooks, Grid, Scheme, quantize_nearest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
hypothesis_settings = settings(max_examples=40, deadline=None, derandomize=True, database=None)
all_wbits, booleans, seeds = st.sampled_from([2, 3, 4, 8]), st.booleans(), st.integers(0, 1000)
dtypes = st.sampled_from(DTYPES)


def random(*shape, seed=0):
    """Return a float32 tensor of normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x, dtype=torch.float32):
    """Round a Python float to float32 and then to dtype."""
    return torch.tensor(x, dtype=torch.float64).float().to(dtype).item()


def reference_grid(values, scheme, dtype, shrink=1.0):
    """Return scale and zero for the kept weights of a row, a list, with the range multiplied by shrink."""
    codes = 2 ** scheme.wbits - 1
    low, high = min([0.0, *values]), max([0.0, *values])
    if scheme.sym:
        low, high = -max(-low, high), max(-low, high)
    low, high = rounded(rounded(shrink) * low), rounded(rounded(shrink) * high)
    scale = rounded(rounded(rounded(high - low) / codes), dtype) or 1.0
    return scale, 2 ** (scheme.wbits - 1) if scheme.sym else min(round(rounded(-low / scale)), codes)


def reference_rounding(w, scale, zero, wbits, dtype):
    """Round one weight to scale · (code − zero)."""
    step = min(max(round(rounded(w / scale)), -zero), 2 ** wbits - 1 - zero)
    return rounded(step * scale, dtype)


def squared_error(values, factors, scale, zero, wbits):
    return sum(factor * (w - reference_rounding(w, scale, zero, wbits, torch.float32)) ** 2
               for w, factor in zip(values, factors, strict=True))


def reference_codebook(number, wbits):
    """Return the values of a codebook in units of its scale, ascending."""
    a, c = CODEBOOKS[number]
    top = 2 ** (wbits - 1) - 1
    sizes = [rounded(a + (1 - a) * (math.exp(c * k / top) - 1) / (math.exp(c) - 1), torch.bfloat16)
             for k in range(top + 1)]
    return [-size for size in reversed(sizes)] + sizes


def random_grid(rows, groups, width, wbits, dtype, sym=False, permuted=False, seed=0):
    """Return a Grid for matrices (rows, groups · width). permuted: whether columns of a group stand anywhere."""
    generator = torch.Generator().manual_seed(seed)
    scale = (0.5 + torch.rand(rows, groups, generator=generator)).to(dtype)
    zero = torch.randint(0, 2 ** wbits, (rows, groups), dtype=torch.uint8, generator=generator)
    if sym:
        zero.fill_(2 ** (wbits - 1))
    group = torch.arange(groups, dtype=torch.int32).repeat_interleave(width)
    if permuted:
        group = group[torch.randperm(len(group), generator=generator)]
    return Grid(Scheme(wbits, -1 if groups == 1 else width, sym), scale, zero, group)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_rows_without_weights_have_a_finite_grid_that_holds_zero(sym, mse):
    W, pruned = random(3, 8), torch.zeros(3, 8, dtype=torch.bool)
    W[0], pruned[1] = 0, True
    scale, zero = Scheme(4, sym=sym, mse=mse).fit(W, pruned, torch.bfloat16)
    assert scale.isfinite().all() and (scale > 0).all() and ((zero >= 0) & (zero <= 15)).all()
    assert (Scheme(4).rounder(scale, zero, torch.bfloat16)(torch.zeros(8, 3)) == 0).all()
    assert Scheme(4, sym=sym, mse=mse).fit(W[:0], pruned[:0], torch.bfloat16)[0].shape == (0,)  # a process's share


@pytest.mark.parametrize("mse", [False, True])
def test_rows_without_weights_have_a_finite_codebook(mse):
    W, pruned = random(3, 8), torch.zeros(3, 8, dtype=torch.bool)
    W[0], pruned[1] = 0, True
    scale, number = Codebooks(4, mse=mse).fit(W, pruned, torch.bfloat16)
    assert scale.isfinite().all() and (scale > 0).all() and ((number >= 0) & (number <= 15)).all()
    assert Codebooks(4, mse=mse).fit(W[:0], pruned[:0], torch.bfloat16)[0].shape == (0,)
    W[0, 3], pruned[0, 3] = 0.5, False  # of a single weight all is known
    scale, number = Codebooks(4, mse=True).fit(W, pruned, torch.float32)
    assert rounded(0.5) in [rounded(value * scale[0].item()) for value in reference_codebook(int(number[0]), 4)]


@hypothesis_settings
@given(wbits=st.sampled_from([2, 3, 4]), dtype=dtypes, seed=seeds, outlier=st.sampled_from([1, 4]), weighted=booleans)
def test_the_search_for_a_codebook_comes_near_the_least_error_over_kept_weights(wbits, dtype, seed, outlier, weighted):
    W, pruned = random(2, 300, seed=seed), random(2, 300, seed=seed + 1) < 0
    W[:, 0] *= outlier
    W[pruned] *= 10
    importance = random(300, seed=seed + 2).exp() if weighted else None
    factors = importance if weighted else torch.ones(300)

    def error(w, h, number, scale):
        values = torch.tensor(reference_codebook(number, wbits)) * scale
        return (h * (w[:, None] - values).square().amin(1)).sum().item()

    for row, mask, scale, number in zip(W, pruned, *Codebooks(wbits, mse=True).fit(W, pruned, dtype, importance),
                                        strict=True):
        w, h = row[~mask], factors[~mask]
        largest = w.abs().max().item()
        least = min(error(w, h, book, largest * step / 40) for book in range(2**wbits) for step in range(8, 45))
        found = error(w, h, int(number), scale.item())
        assert rounded(scale.item(), dtype) == scale
        assert found <= 1.05 * least + 1e-6
        _, widest = Codebooks(wbits).fit(row[None], mask[None], torch.float32, importance)
        assert all(error(w, h, int(widest), largest) <= error(w, h, book, largest) * (1 + 1e-4) + 1e-6
                   for book in range(2**wbits))


@pytest.mark.parametrize("wbits", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_codebooks_have_codes_and_zeros_stay_zeros(wbits, dtype):
    W = magnitude_prune(random(6, 48).to(dtype), Target(0.5))
    Q, grid = quantize_nearest(W, Codebooks(wbits, 16, mse=True))
    assert torch.equal(Q == 0, W == 0) and len(grid.zero.unique()) > 1
    codes = grid.codes(Q)
    for i in range(6):
        for j in range(48):
            scale, number = grid.scale[i, j // 16].item(), int(grid.zero[i, j // 16])
            values = [rounded(value * scale, dtype) for value in reference_codebook(number, wbits)]
            nearest = min((abs(value - W[i, j].item()), value) for value in values)[1]
            assert W[i, j] == 0 or Q[i, j].item() == values[codes[i, j]] == nearest
    Q[2, 3] = 1.01 * grid.scale[2, 0]
    with pytest.raises(ValueError, match="do not lie on the grid"):
        grid.codes(Q)


@hypothesis_settings
@given(wbits=all_wbits, sym=booleans, dtype=dtypes, seed=seeds, outlier=st.sampled_from([1, 4]), weighted=booleans)
def test_the_search_takes_the_range_with_the_least_error_over_kept_weights(wbits, sym, dtype, seed, outlier, weighted):
    W, pruned = random(2, 12, seed=seed), random(2, 12, seed=seed + 1) < 0
    W[:, 0] *= outlier
    W[pruned] *= 10
    importance = random(12, seed=seed + 2).exp() if weighted else None
    scheme, factors = Scheme(wbits, sym=sym, mse=True), importance.tolist() if weighted else [1.0] * 12
    for row, mask, scale, zero in zip(W, pruned, *(x.tolist() for x in scheme.fit(W, pruned, dtype, importance)),
                                      strict=True):
        kept = row[~mask].tolist()
        kept_factors = [factor for factor, gone in zip(factors, mask.tolist(), strict=True) if not gone]
        candidates = [reference_grid(kept, scheme, dtype, shrink / 32) for shrink in SHRINKS]
        errors = [squared_error(kept, kept_factors, *candidate, wbits) for candidate in candidates]
        assert (scale, zero) in candidates
        error = squared_error(kept, kept_factors, scale, zero, wbits)
        assert error <= min(errors) * (1 + 1e-5) + 1e-12  # errors are summed in float32 there
        assert errors[0] == squared_error(kept, kept_factors, *reference_grid(kept, scheme, dtype), wbits)


@hypothesis_settings
@given(wbits=all_wbits, dtype=dtypes, seed=seeds, data=st.data())
def test_rounding_finds_the_nearest_of_all_codes(wbits, dtype, seed, data):
    zero = data.draw(st.integers(0, 2 ** wbits - 1), label="zero")
    scale = rounded(data.draw(st.floats(0.01, 2), label="scale"), dtype)
    W = random(20, seed=seed) * scale * 2 ** wbits
    result = Scheme(wbits).rounder(torch.tensor(scale), torch.tensor(float(zero)), dtype)(W)
    exact = [scale * (code - zero) for code in range(2 ** wbits)]
    for w, q in zip(W.tolist(), result.tolist(), strict=True):
        distance = min(abs(w - value) for value in exact if rounded(value, dtype) == q)
        assert distance <= min(abs(w - value) for value in exact) + 1e-5 * scale  # either, halfway between two


@pytest.mark.parametrize("wbits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups, sym, permuted", [(1, False, False), (1, True, False), (3, False, False),
                                                   (3, True, True), (3, False, True)])
def test_every_code_has_its_weight_and_every_weight_its_code(wbits, dtype, groups, sym, permuted):
    grid, each = random_grid(3, groups, 2 ** wbits, wbits, dtype, sym, permuted), torch.arange(2 ** wbits)
    codes = torch.zeros(3, len(grid.group), dtype=torch.uint8)
    codes[:, grid.group.argsort()] = each.repeat(groups).to(torch.uint8)  # in the columns of each group
    W = grid.weights(codes)
    for i, row in enumerate(codes.tolist()):
        expected = [(code - int(grid.zero[i, g])) * grid.scale[i, g].item()
                    for code, g in zip(row, grid.group.tolist(), strict=True)]
        assert W[i].tolist() == [rounded(w, dtype) for w in expected] and W.dtype == dtype
    if (wbits, dtype) != (8, torch.bfloat16):  # there neighbours may round to the same weight
        assert torch.equal(grid.codes(W), codes)
    assert torch.equal(grid.weights(grid.codes(W)), W) and grid.codes(W).dtype == torch.uint8


@pytest.mark.parametrize("zero", [0, 128, 255])
def test_every_weight_of_every_8_bit_grid_in_bfloat16_has_a_code(zero):
    scale = 1 + torch.arange(128)[:, None] / 128  # all of them up to powers of 2
    grid = Grid(Scheme(8), scale.bfloat16(), torch.full((128, 1), zero, dtype=torch.uint8),
                torch.zeros(256, dtype=torch.int32))
    W = ((torch.arange(256) - zero) * scale).bfloat16()
    assert torch.equal(grid.weights(grid.codes(W)), W)


@pytest.mark.parametrize("code", [2.5, 2.001, -1, 16, 20, 255, 256, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("sym", [False, True])
def test_weights_off_the_grid_have_no_code(code, sym):
    grid, codes = random_grid(3, 1, 16, 4, torch.float32, sym), torch.arange(16, dtype=torch.uint8).repeat(3, 1)
    W = grid.weights(codes)
    assert torch.equal(grid.codes(W), codes)
    W[1, 7] = (code - int(grid.zero[1, 0])) * grid.scale[1, 0]
    with pytest.raises(ValueError, match="do not lie on the grid"):
        grid.codes(W)


@hypothesis_settings
@given(wbits=all_wbits, sym=booleans, dtype=dtypes, groupsize=st.sampled_from([-1, 4, 8]), rows=st.integers(1, 4),
       eights=st.integers(1, 3), sparsity=st.floats(0, 1), seed=seeds)
def test_quantizing_rounds_weights_to_the_grids_of_groups(wbits, sym, dtype, groupsize, rows, eights, sparsity, seed):
    columns = 8 * eights
    W = magnitude_prune(random(rows, columns, seed=seed).to(dtype), Target(sparsity))
    before, scheme = W.clone(), Scheme(wbits, groupsize, sym)
    Q, grid = quantize_nearest(W, scheme)
    width = columns if groupsize == -1 else groupsize
    expected, grids = [], []
    for row in W.tolist():
        expected.append([])
        for left in range(0, columns, width):
            weights = row[left:left + width]
            grids.append(reference_grid([w for w in weights if w], scheme, dtype))
            expected[-1] += [reference_rounding(w, *grids[-1], wbits, dtype) for w in weights]
    assert Q.tolist() == expected and Q.dtype == dtype and torch.equal(W, before)
    assert list(zip(grid.scale.flatten().tolist(), grid.zero.flatten().tolist(), strict=True)) == grids
    assert grid.scheme == scheme and grid.group.tolist() == [j // width for j in range(columns)]
    assert (grid.scale.dtype, grid.zero.dtype, grid.group.dtype) == (dtype, torch.uint8, torch.int32)
    assert torch.equal(grid.weights(grid.codes(Q)), Q)


@pytest.mark.parametrize("groupsize", [-1, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [(0.5, 0, 0), (0.0, 2, 4)])
def test_zeros_stay_zeros_without_a_sign(target, dtype, groupsize, sym, mse):
    W = magnitude_prune(random(6, 16).to(dtype), Target(*target))
    W[0, :4] = torch.tensor([-0.0, -1e-3, 1e-3, -2.0])  # the small ones round to 0 as well
    Q, grid = quantize_nearest(W, Scheme(3, groupsize, sym, mse))
    assert (Q[W == 0] == 0).all() and Q[0, :3].tolist() == [0, 0, 0]
    assert not Q[Q == 0].signbit().any()
    assert torch.equal(grid.weights(grid.codes(Q)), Q)
