"""Check the choice among ranges of a grid, on any device and compiled, against plain Python."""

import pytest
import torch

from mixgpt.kernels import ranges, ranges_cpu

KERNELS = {"torch": ranges.closest, "compiled": ranges_cpu.closest}


def errors_of(row, importance, grids):
    """Return the weighted squared error of a row, a list, on each of several grids (scale, low, high)."""
    return [sum(factor * (min(max(round(w / scale), low), high) * scale - w) ** 2
                for w, factor in zip(row, importance, strict=True)) for scale, low, high in grids]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_row_gets_the_grid_with_the_least_weighted_error(name, dtype, transposed):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(41, 67, generator=generator, dtype=dtype).pow(3)
    if transposed:
        W = W.t().contiguous().t()
    importance = torch.rand(67, generator=generator, dtype=dtype).pow(4)
    scale = torch.rand(9, 41, generator=generator, dtype=dtype) + 0.1
    low = -torch.randint(0, 8, (9, 41), generator=generator).to(dtype)
    best = KERNELS[name](W, importance, scale, low, low + 7)
    assert best.dtype == torch.int64 and len(best.unique()) > 5
    for row, chosen, grids in zip(W.tolist(), best.tolist(), torch.stack([scale, low, low + 7], 2).unbind(1),
                                  strict=True):
        errors = errors_of(row, importance.tolist(), grids.tolist())
        assert errors[chosen] <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_of_grids_that_are_equally_close_the_first_is_taken(name):
    W = torch.tensor([[1.0, 2.0, -2.0], [0.0, 0.0, 0.0]])
    scale = torch.tensor([[3.0, 3.0], [1.0, 3.0], [0.5, 1.0], [1.0, 2.0]])
    best = KERNELS[name](W, torch.ones(3), scale, torch.full_like(scale, -4), torch.full_like(scale, 3))
    assert best.tolist() == [1, 0]
