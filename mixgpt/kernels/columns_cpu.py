"""The walk over the columns of a narrow range, compiled for the CPU; see `columns.walk_columns`.

Single-threaded: the errors of a tile stay in L1 cache, so that this costs far less than the surrounding products.
"""

import functools

import numba
import numpy as np
import torch

TILE = 64  # rows of W at a time
GRID_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # supported by the compiled code
OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


def walk_columns(W, E, U, mask, choice, grid):
    """Walk the columns of a range on the host; arguments as in `columns.walk_columns`."""
    prunem, prunens, factors = choice or (0, [(slice(0, W.shape[1]), 0)], W[:, 0])
    W, E, U, mask, factors = (x.numpy() for x in (W, E, U, mask, factors))
    scale, low, high = (x.numpy() for x in grid[:3]) if grid else (W[0, :0],) * 3
    walk_rows, tile = _walk_of(W.dtype), _tile(len(W), W.dtype)
    for rows, n in prunens:
        walk_rows(W, E, U, mask, factors, rows.start, rows.stop, prunem, n, scale, low, high,
                  grid is not None and grid.dtype == torch.bfloat16, *tile)


@functools.cache
def _walk_of(dtype):
    """Return `_walk_rows` compiled for W's dtype and any strides: compiling takes seconds for each kind of array."""
    value = numba.from_dtype(dtype)
    matrix, vector, tile, flag = value[:, :], value[:], value[:, ::1], numba.boolean
    _walk_rows.disable_compile(False)
    _walk_rows.compile((matrix, matrix, matrix, flag[:, :], vector, *(numba.int64,) * 4, *(vector,) * 3, flag,
                        tile, tile, flag[:, ::1], tile, tile, numba.int32[::1]))
    _walk_rows.disable_compile()
    return _walk_rows


def _tile(columns, dtype):
    """Allocate what the walk over a tile works on: weights, errors, mask, limits of the grid, scores and ranks."""
    w, e, scores = np.zeros((3, columns, TILE), dtype)
    return w, e, np.zeros((columns, TILE), bool), np.ones((3, TILE), dtype), scores, np.zeros(TILE, np.int32)


@numba.njit(fastmath={"contract"}, **OPTIONS)
def _update(W, E, U, column, start, stop):
    """Update a column of a tile for the errors of columns start … stop − 1."""
    for k in range(start, stop):
        share = U[k, column]
        for r in range(TILE):
            W[column, r] -= share * E[k, r]


@numba.njit(fastmath={"contract"}, **OPTIONS)
def _walk_rows(W, E, U, mask, factors, start, stop, prunem, prunen, scale, low, high, bfloat16, w, e, remove, limits,
               scores, rank):
    """Walk all columns for rows start … stop − 1; scale is empty without quantization. The rest is as in `_tile`."""
    columns, width = len(W), max(prunem, 1)
    step, least, most = limits[0], limits[1], limits[2]
    for first in range(start, stop, TILE):
        rows = min(TILE, stop - first)
        w[:, :rows], remove[:, :rows] = W[:, first:first + rows], mask[:, first:first + rows]
        for r in range(rows if len(scale) else 0):
            step[r], least[r], most[r] = scale[first + r], low[first + r], high[first + r]
        for group in range(0, columns, width):
            for j in range(group, group + width):
                _update(w, e, U, j, 0, group)
            if prunem:
                _choose(w, remove, factors, scores, rank, group, width, prunen)
            for j in range(group, group + width):
                _update(w, e, U, j, group, j)
                diagonal = 1 / U[j, j]
                if len(scale) == 0:
                    for r in range(TILE):
                        e[j, r] = w[j, r] * diagonal if remove[j, r] else 0
                        w[j, r] = 0 if remove[j, r] else w[j, r]
                else:
                    for r in range(TILE):
                        q = min(max(np.rint(w[j, r] / step[r]), least[r]), most[r]) * step[r]
                        e[j, r] = 0 if remove[j, r] else q
                    if bfloat16:
                        bits = e[j].view(np.uint32)
                        for r in range(TILE):
                            bits[r] = (bits[r] + 0x7FFF + ((bits[r] >> 16) & 1)) & 0xFFFF0000
                    for r in range(TILE):
                        q = e[j, r]
                        e[j, r] = (w[j, r] - q) * diagonal
                        w[j, r] = q
        W[:, first:first + rows], E[:, first:first + rows] = w[:, :rows], e[:, :rows]
        if prunem:
            mask[:, first:first + rows] = remove[:, :rows]


@numba.njit(fastmath={"contract"}, **OPTIONS)
def _choose(W, remove, factors, scores, rank, group, width, prunen):
    """Mark the prunen least salient of columns group … group + width − 1 per row of a tile, marked ones first."""
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
            remove[j, r] |= rank[r] < prunen
