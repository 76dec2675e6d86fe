"""Walk over the columns of a narrow range one by one: for any device, compiled for CPUs, and the choice among these."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mixgpt.common.errors import one_line
from mixgpt.kernels.rounding import Levels, UniformGrid
from mixgpt.kernels.selection import compiled, smallest_in_groups

TILE = 64  # Rows of W that are walked together.
Choice = tuple[int, Tensor, Tensor] | None  # As `walk_columns` takes it.


def walk_columns(W: Tensor, E: Tensor, U: Tensor, mask: Tensor, choice: Choice,
                 grid: UniformGrid | Levels | None) -> None:
    """Prune or round the weights of each column in turn, compensating the error in the columns after it.

    W: (n, out), the columns of a range, updated for all errors before it; overwritten with the new weights. E: (n,
    out), overwritten with the errors divided by the diagonal of U. U: (n, n), upper triangular. mask: (n, out), the
    weights to prune. choice: (prunem, prunens (out,), int32, factors (n,)), to choose here the prunen lowest scores
    w² · factors of every prunem weights of a row, masked ones first; or None. grid: rounds a column (out,); or None.
    SparseGPT (arXiv 2301.00774), algorithm 1, and GPTQ (arXiv 2210.17323), eq. 2 and 3.
    """
    prunem, prunens, factors = choice or (0, 0, W)
    for j in range(len(W)):
        if prunem and j % prunem == 0:
            group = slice(j, j + prunem)
            now = W[group] - U[:j, group].t() @ E[:j]
            scores = now.square_().mul_(factors[group, None]).masked_fill_(mask[group], -1)
            mask[group] |= smallest_in_groups(scores[None], prunens)[0]
        w, e = W[j], E[j]
        w.addmv_(E[:j].t(), U[:j, j], alpha=-1)
        q = w if grid is None else grid(w)
        q = q.masked_fill(mask[j], 0)
        torch.sub(w, q, out=e).div_(U[j, j])
        w.copy_(q)


def walk_compiled(W: Tensor, E: Tensor, U: Tensor, mask: Tensor, choice: Choice,
                  grid: UniformGrid | Levels | None) -> None:
    """Do the same on the host, compiled, in one thread: the errors of a tile of rows stay in L1 cache."""
    nothing = W.new_empty(0)
    prunem, prunens, factors = choice or (0, nothing.int(), nothing)
    limits = grid[:3] if isinstance(grid, UniformGrid) else (nothing,) * 3
    levels = grid if isinstance(grid, Levels) else (nothing[None],) * 2
    # All arrays are contiguous, because numba compiles for seconds for each kind of array.
    U, factors, *limits = (x.contiguous().numpy() for x in (U, factors, *limits, *levels))
    _walk_rows(W.numpy(), E.numpy(), U, mask.numpy(), factors, prunem, prunens.numpy(), *limits,
               isinstance(grid, UniformGrid) and grid.dtype == torch.bfloat16)


@compiled
def _update(W: np.ndarray, E: np.ndarray, U: np.ndarray, column: int, start: int, stop: int) -> None:
    """Update a column of a tile for the errors of columns start … stop − 1."""
    for k in range(start, stop):
        share = U[k, column]
        for r in range(TILE):
            W[column, r] -= share * E[k, r]


@compiled
def _walk_rows(W: np.ndarray, E: np.ndarray, U: np.ndarray, mask: np.ndarray, factors: np.ndarray, prunem: int,
               prunens: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray, borders: np.ndarray,
               values: np.ndarray, bfloat16: bool) -> None:
    """Walk all columns; scale is empty unless grids are uniform, values unless they have levels."""
    (columns, out), width = W.shape, max(prunem, 1)
    w, remove = np.zeros((columns, TILE), W.dtype), np.zeros((columns, TILE), np.bool_)
    rank, prunen = np.zeros(TILE, np.int32), np.zeros(TILE, np.int32)
    e, scores, limits = np.zeros_like(w), np.zeros_like(w), np.ones((3, TILE), W.dtype)
    step, least, most = limits[0], limits[1], limits[2]
    border, value = np.zeros((len(borders), TILE), W.dtype), np.zeros((len(values), TILE), W.dtype)
    uniform, uneven = len(scale) > 0, values.size > 0
    for first in range(0, out, TILE):
        rows = min(TILE, out - first)
        part = slice(first, first + rows)
        w[:, :rows], remove[:, :rows] = W[:, part], mask[:, part]
        if uneven:
            border[:, :rows], value[:, :rows] = borders[:, part], values[:, part]
        if uniform:
            step[:rows], least[:rows], most[:rows] = scale[part], low[part], high[part]
        if prunem:
            prunen[:rows] = prunens[part]
        for group in range(0, columns, width):
            for j in range(group, group + width):
                _update(w, e, U, j, 0, group)
            if prunem:
                _choose(w, remove, factors, scores, rank, group, width, prunen)
            for j in range(group, group + width):
                _update(w, e, U, j, group, j)
                diagonal = 1 / U[j, j]
                q = e[j]
                for r in range(TILE):
                    q[r] = value[0, r] if uneven else w[j, r]
                if uneven:
                    for level in range(len(border)):
                        for r in range(TILE):
                            q[r] = value[level + 1, r] if w[j, r] > border[level, r] else q[r]
                if uniform:
                    for r in range(TILE):
                        q[r] = min(max(np.rint(w[j, r] / step[r]), least[r]), most[r]) * step[r]
                for r in range(TILE):
                    q[r] = 0 if remove[j, r] else q[r]
                if bfloat16:
                    bits = q.view(np.uint32)
                    for r in range(TILE):
                        bits[r] = (bits[r] + 0x7FFF + ((bits[r] >> 16) & 1)) & 0xFFFF0000
                for r in range(TILE):
                    rounded = q[r]
                    e[j, r] = (w[j, r] - rounded) * diagonal
                    w[j, r] = rounded
        W[:, part], E[:, part], mask[:, part] = w[:, :rows], e[:, :rows], remove[:, :rows]


@compiled
def _choose(W: np.ndarray, remove: np.ndarray, factors: np.ndarray, scores: np.ndarray, rank: np.ndarray, group: int,
            width: int, prunen: np.ndarray) -> None:
    """Mark the prunen (TILE,) least salient weights of each row in columns from `group` on, marked ones first."""
    for j in range(group, group + width):
        for r in range(TILE):
            scores[j, r] = -1 if remove[j, r] else W[j, r] * W[j, r] * factors[j]
    for j in range(group, group + width):
        for r in range(TILE):
            rank[r] = 0
        for other in range(group, group + width):
            tie = other < j
            for r in range(TILE):
                rank[r] += (scores[other, r] < scores[j, r]) | (tie & (scores[other, r] == scores[j, r]))
        for r in range(TILE):
            remove[j, r] |= rank[r] < prunen[r]


@functools.cache
def triton_obstacle(device: torch.device) -> str | None:
    """Return why Triton, which needs a C compiler and the driver's libraries, cannot run on a GPU; None if it can."""
    W, E, mask = torch.ones(2, 2, device=device), torch.empty(2, 2, device=device), torch.ones(2, 2, device=device) > 0
    try:
        from mixgpt.kernels import columns_cuda  # Triton is installed only where there may be a GPU.
        columns_cuda.walk_columns(W, E, torch.eye(2, device=device), mask, None, None)
    except Exception as error:  # The import, Triton, the compiler or the driver may fail, each in a way of its own.
        return one_line(error)[:200]
    return None


def fastest(W: Tensor, grid: UniformGrid | Levels | None = None) -> Callable:
    """Return the fastest `walk_columns` for a matrix and a grid."""
    dtypes = W.dtype, grid.dtype if isinstance(grid, UniformGrid) else W.dtype
    if W.device.type == "cpu" and (dtypes[0] == dtypes[1] or dtypes == (torch.float32, torch.bfloat16)):
        return walk_compiled
    if W.device.type == "cuda" and W.dtype == torch.float32 and triton_obstacle(W.device) is None:
        from mixgpt.kernels import columns_cuda
        if dtypes[1] in columns_cuda.GRID_DTYPES:
            return columns_cuda.walk_columns
    return walk_columns
