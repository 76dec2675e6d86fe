"""Check the walks over the columns of a range, plain, compiled and in Triton, against the formulas in plain loops."""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import CPU, ON_GPU

from mixgpt.kernels import columns
from mixgpt.kernels.rounding import Levels, UniformGrid

GPU = torch.device("cuda" if ON_GPU else "cpu")  # Triton's interpreter runs on the CPU
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
NEAR = 1e-3  # how near a tie, in steps of a grid or as a fraction of a score, float32 may break it another way


class Case(NamedTuple):
    """A range to walk: its columns, the rows of each matrix, and what becomes of their weights."""

    width: int
    rows: tuple
    prunem: int = 0
    prunens: tuple = ()
    wbits: int = 0  # 0: not rounded
    uneven: bool = False  # rounded to any 2^wbits values
    sym: bool = False
    dtype: torch.dtype = torch.float32  # of the grids
    seed: int = 0


SPARSE = [Case(1, (7,)), Case(5, (1,)), Case(16, (130,)), Case(128, (70,))]
N_OF_M = [Case(16, (64,), 4, (2,)), Case(48, (40, 90), 4, (1, 3)), Case(128, (33, 10, 5), 4, (2, 0, 4)),
          Case(15, (9, 1), 5, (2, 3))]
GRIDS = [Case(48, (64,), wbits=2), Case(16, (130,), wbits=3, sym=True), Case(1, (1,), wbits=4),
         Case(48, (20, 50), 4, (1, 3), wbits=4), Case(16, (33,), 8, (4,), wbits=8),
         Case(48, (70,), wbits=4, uneven=True), Case(16, (20, 50), 4, (1, 3), wbits=2, uneven=True)]
BFLOAT16 = [Case(48, (40,), wbits=8, sym=True, dtype=torch.bfloat16),
            Case(16, (7, 60), 4, (2, 1), wbits=4, dtype=torch.bfloat16)]
FLOAT16 = [Case(48, (70,), wbits=8, dtype=torch.float16), Case(16, (20,), 4, (2,), wbits=2, dtype=torch.float16)]
DOUBLE = [case._replace(dtype=torch.float64) for case in GRIDS]

WALKS = ([("torch", torch.float32, case) for case in SPARSE + N_OF_M + GRIDS + BFLOAT16 + FLOAT16]
         + [("torch", torch.float64, case) for case in SPARSE + N_OF_M + GRIDS + DOUBLE + BFLOAT16 + FLOAT16]
         + [("compiled", torch.float32, case) for case in SPARSE + N_OF_M + GRIDS + BFLOAT16]
         + [("compiled", torch.float64, case) for case in SPARSE + N_OF_M + DOUBLE]
         + [("triton", torch.float32, case) for case in SPARSE + N_OF_M + GRIDS + BFLOAT16 + FLOAT16])


def marked(name, *others):
    slow = name == "triton" and not ON_GPU and any(isinstance(each, Case) and each.width > 16 for each in others)
    return pytest.param(name, *others, marks=(ON_GPU if name == "triton" else []) + [pytest.mark.slow] * slow)


def walker(name, grid_dtype=None):
    """Return a `walk_columns` and the device of its tensors."""
    if name != "triton":
        return {"torch": columns.walk_columns, "compiled": columns.walk_compiled}[name], CPU
    if GPU == CPU and grid_dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts digits off where a GPU rounds to bfloat16; float16 goes the same way")
    return pytest.importorskip("mixgpt.kernels.columns_cuda", exc_type=ImportError).walk_columns, GPU


def prunens_of(case):
    """Return prunen of each row of a case."""
    return [n for count, n in zip(case.rows, case.prunens or [0] * len(case.rows), strict=True) for _ in range(count)]


def make(case):
    """Return W, U, mask, factors and grid of a case, float32 numbers in float64."""
    generator = torch.Generator().manual_seed(case.seed)
    width, out = case.width, sum(case.rows)
    W = torch.randn(width, out, generator=generator)
    U = (torch.randn(width, width, generator=generator) / width**0.5).triu(1)
    U += torch.diag(0.5 + torch.rand(width, generator=generator))
    mask = torch.rand(width, out, generator=generator) < 0.5
    factors = 0.5 + torch.rand(width, generator=generator)
    grid = None
    if case.wbits:  # narrower than most rows, such that weights lie beyond both its ends
        codes = 2**case.wbits - 1
        scale = (3 + torch.rand(out, generator=generator)) / codes
        scale = scale if case.dtype == torch.float64 else scale.to(case.dtype)
        zero = torch.randint(codes // 3, codes // 2 + 1, (out,), generator=generator)
        zero = torch.full((out,), (codes + 1) // 2) if case.sym else zero
        grid = scale.double(), -zero.double(), (codes - zero).double(), case.dtype
    if case.uneven:
        grid = torch.randn(codes + 1, out, generator=generator).sort(0).values.double(),
    return W.double(), U.double(), mask, factors.double(), grid


@lru_cache(None)
def brute_force(case):
    """Walk the range of a case with every column compensating at once in all behind it.

    Returns new weights, errors and mask, (width, out), and which rows never came near a tie, (out,): there float32
    may round a weight to the next code or choose another weight of two alike, and all that follows differs.
    """
    W, U, mask, factors, grid = make(case)
    W, U, mask, factors = W.numpy(), U.numpy(), mask.numpy(), factors.numpy()
    E, margin = np.zeros_like(W), np.full(W.shape[1], np.inf)
    for row, n in enumerate(prunens_of(case)):
        w = W[:, row]
        for j in range(case.width):
            if case.prunem and j % case.prunem == 0:
                group = range(j, j + case.prunem)
                scores = {k: w[k] ** 2 * factors[k] for k in group}
                order = sorted(group, key=lambda k: (not mask[k, row], scores[k]))  # those of the mask first
                alike = 0 < n < case.prunem and mask[order[n - 1], row] == mask[order[n], row]
                mask[group, row] |= [k in order[:n] for k in group]
                if alike:
                    margin[row] = min(margin[row], scores[order[n]] / scores[order[n - 1]] - 1)
            q = 0.0 if mask[j, row] else w[j]
            if grid and not mask[j, row]:
                if case.uneven:
                    nearest, other = sorted(grid[0][:, row].tolist(), key=lambda value, w=w[j]: abs(w - value))[:2]
                    steps, q = (w[j] - nearest) / ((other - nearest) or 1), nearest
                else:
                    scale, low, high = (x[row].item() for x in grid[:3])
                    steps = w[j] / scale
                    q = torch.tensor(min(max(round(steps), low), high) * scale, dtype=torch.float64)
                    q = q.to(case.dtype).item()
                margin[row] = min(margin[row], abs(steps % 1 - 0.5))
            E[j, row] = (w[j] - q) / U[j, j]
            w[j:] -= E[j, row] * U[j, j:]  # the first of them: w − (w − q)
            w[j] = q
    return torch.tensor(W), torch.tensor(E), torch.tensor(mask), torch.tensor(margin > NEAR)


def inside(values, device, *, extra_columns=0, by_columns=False):
    """Return a tensor with rows, and maybe columns, around a copy of `values`, and the view of that copy."""
    shape = values.shape[0] + 5, values.shape[1] + extra_columns
    large = torch.ones(shape[::-1] if by_columns else shape, dtype=values.dtype, device=device)
    large = large.t() if by_columns else large
    view = large[2:2 + len(values), :values.shape[1]]
    view.copy_(values)
    return large, view


def untouched(large, values):
    """Tell whether all around the copy of `values` that `inside` made is as it was."""
    around = large.clone()
    around[2:2 + len(values), :values.shape[1]] = 1
    return bool((around == 1).all())


# layouts: which of W (with E and the mask) and of U lie by columns; solve_triangular returns U so, on a GPU too
@pytest.mark.parametrize(("name", "dtype", "case", "layouts"), [
    *(marked(*walk, (False, False)) for walk in WALKS),
    *(marked(name, torch.float32, case, layouts) for layouts in [(False, True), (True, True)]
      for name in ("torch", "compiled", "triton") for case in (SPARSE[2], N_OF_M[0], GRIDS[1])
      if not (name == "triton" and layouts[0]))], ids=str)
def test_walks_as_the_formulas_say(name, dtype, case, layouts):
    walk, device = walker(name, case.dtype)
    W, U, mask, factors, grid = make(case)
    matrix, triangle = ({"by_columns": by_columns} for by_columns in layouts)
    large_W, inner_W = inside(W.to(dtype), device, **matrix)
    large_E, inner_E = inside(torch.full_like(W, torch.nan, dtype=dtype), device, **matrix)
    large_mask, inner_mask = inside(mask, device, **matrix)
    large_U, inner_U = inside(U.to(dtype), device, extra_columns=4, **triangle)
    factors = factors.to(device, dtype)
    if grid:
        tensors = [x.to(device, dtype) for x in grid[:3]]
        grid = Levels.between(*tensors) if case.uneven else UniformGrid(*tensors, grid[3])
    choice = case.prunem and (case.prunem, torch.tensor(prunens_of(case), dtype=torch.int32, device=device), factors)
    walk(inner_W, inner_E, inner_U, inner_mask, choice, grid)

    new, errors, removed, compared = brute_force(case)
    assert compared.double().mean() >= 0.5
    if dtype == torch.float64:
        compared = slice(None)
    for got, expected in (inner_W, new), (inner_E, errors):
        scale = expected.abs().amax(0).clamp_min(1)
        off = ((got.cpu().double() - expected) / scale).abs().amax(0)[compared]
        assert off.max() < TOLERANCE[dtype]
    assert torch.equal(inner_mask.cpu()[:, compared], removed[:, compared])
    assert untouched(large_W, W) and untouched(large_E, W) and untouched(large_mask, W)
    assert torch.equal(inner_U.cpu(), U.to(dtype))


def independent(W):
    """Return E, U and mask for columns W that leave nothing to each other, laid out as above: no new build."""
    _, E = inside(torch.zeros_like(W), W.device)
    _, U = inside(torch.eye(len(W)), W.device, extra_columns=4)
    _, mask = inside(torch.zeros_like(W, dtype=torch.bool), W.device)
    return E, U, mask


@pytest.mark.parametrize("name", [*map(marked, ["torch", "compiled", "triton"])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_are_rounded_to_even_and_what_is_no_number_does_not_become_one(name, dtype):
    walk, device = walker(name)  # these few codes are the same in any dtype
    W = torch.arange(-9, 11, device=device)[:, None] / 2 + torch.tensor([0, 1e-6, -1e-6], device=device)
    W[-1], ones = torch.nan, torch.ones(3, device=device)
    grid = UniformGrid(ones, -4 * ones, 3 * ones, dtype)
    expected = grid(W)
    walk(W, *independent(W), None, grid)
    assert torch.equal(W[:-1], expected[:-1]) and W[-1].isnan().all()


@pytest.mark.parametrize("name", [*map(marked, ["torch", "compiled", "triton"])])
def test_the_first_of_equal_scores_are_removed(name):
    walk, device = walker(name)
    W = torch.tensor([2.0, 1, 1, -1, 0, 0, 0, 0], device=device)[:, None].repeat(1, 2)
    E, U, mask = independent(W)
    prunens = torch.tensor([2, 1], dtype=torch.int32, device=device)
    walk(W, E, U, mask, (4, prunens, torch.ones(8, device=device)), None)
    assert mask.t().int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize(("device", "dtype", "grid_dtype", "walk"), [
    ("cpu", torch.float32, None, "compiled"), ("cpu", torch.float32, torch.bfloat16, "compiled"),
    ("cpu", torch.float32, torch.float16, "torch"), ("cpu", torch.float64, torch.float64, "compiled"),
    ("cpu", torch.float64, torch.float32, "torch"), ("cuda:1", torch.float64, None, "torch"),
    ("cuda:1", torch.float32, torch.float64, "torch"),
    *(("cuda:1", torch.float32, grid, "triton") for grid in (None, torch.float32, torch.bfloat16, torch.float16))])
def test_the_fastest_walk_that_can_round_is_chosen(device, dtype, grid_dtype, walk, monkeypatch):
    ones, W = torch.ones(2), SimpleNamespace(device=torch.device(device), dtype=dtype)  # without memory
    grid, (walk, _) = grid_dtype and UniformGrid(ones, ones, ones, grid_dtype), walker(walk)
    monkeypatch.setattr(columns, "triton_obstacle", lambda device: None)
    assert columns.fastest(W, grid) is walk
    assert columns.fastest(W, Levels(ones, ones)) is columns.fastest(W)
    monkeypatch.setattr(columns, "triton_obstacle", lambda device: "No module named 'triton'")
    assert columns.fastest(W, grid) is (walk if device == "cpu" else columns.walk_columns)


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_without_spilling_registers():
    tools = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "ptxas").is_file():
        pytest.skip(f"Triton brings no compiler, {tools / 'ptxas'}")
    done = subprocess.run([sys.executable, Path(__file__).parent / "aot.py", "80", "90", "100"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
