"""The walk over the columns of a narrow range in one Triton kernel; see `columns.walk_columns`.

A program keeps a tile of rows of W in registers and compensates each error immediately in all later columns: every
column is up to date when it is reached, and W, E and the mask are read or written only once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixgpt.kernels.rounding import Levels, UniformGrid

ROWS, TILE = 32, 4096  # A program has at most so many rows and weights of W: 32 registers per thread.
WARPS = 4
GRID_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROUNDER = tl.constexpr(1.5 * 2**23)  # The spacing of float32 is 1 at this size: adding it rounds to an integer.


def walk_columns(W: Tensor, E: Tensor, U: Tensor, mask: Tensor, choice: tuple[int, Tensor, Tensor] | None,
                 grid: UniformGrid | Levels | None) -> None:
    """Walk the columns of a range on the device; arguments as in `columns.walk_columns`, all float32."""
    columns, out = W.shape
    padded = triton.next_power_of_2(columns)
    tile = max(min(ROWS, TILE // padded), 1)
    prunem, prunens, factors = choice or (0, None, None)
    scale, low, high, dtype = grid if isinstance(grid, UniformGrid) else (None, None, None, torch.float32)
    borders, values = grid if isinstance(grid, Levels) else (None, None)
    with torch.cuda.device_of(W):  # Triton launches on the current device.
        _walk_rows[triton.cdiv(out, tile),](
            W, E, U, mask, factors, prunens, scale, low, high, borders, values, columns, out, *U.stride(),
            PRUNEM=prunem, LEVELS=0 if values is None else len(values), DTYPE=GRID_DTYPES[dtype], COLUMNS=padded,
            ROWS=tile, num_warps=WARPS, enable_fp_fusion=True)


@triton.jit
def _walk_rows(W, E, U, mask, factors, prunens, scale, low, high, borders, values, columns, out, u_row, u_column,
               PRUNEM: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr, COLUMNS: tl.constexpr,
               ROWS: tl.constexpr):
    """Walk a tile of rows of the matrix. Only U, of strides u_row and u_column, need not be contiguous."""
    column, row = tl.arange(0, COLUMNS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < out
    at_w, at_e, at_mask = W + row, E + row, mask + row
    w_all = tl.load(at_w + column[:, None] * out, mask=(column < columns)[:, None] & real, other=0)
    if scale is not None:
        step = tl.load(scale + row, mask=real, other=1)
        least, most = tl.load(low + row, mask=real, other=0), tl.load(high + row, mask=real, other=0)
    if PRUNEM:
        share = tl.load(prunens + row, mask=real, other=0)
        factor = tl.load(factors + column, mask=column < columns, other=0)
        rank = tl.zeros((COLUMNS, ROWS), tl.int32)

    for j in range(columns):
        if PRUNEM:
            if j % PRUNEM == 0:
                scores = w_all * w_all * factor[:, None]
                for k in range(j, j + PRUNEM):  # A whole tile of bytes would impose its layout on the sums.
                    marked = tl.load(at_mask + k * out, mask=real, other=0)
                    scores = tl.where((column == k)[:, None] & marked, -1.0, scores)
                rank = _ranks(scores, column, j, PRUNEM)
            marked = tl.load(at_mask + j * out, mask=real, other=0)
            removed = (_column(rank, column, j) < share) | marked
            tl.store(at_mask + j * out, removed, mask=real)
        else:
            removed = tl.load(at_mask + j * out, mask=real, other=0)
        w = _column(w_all, column, j)
        q = w
        if scale is not None:
            q = tl.clamp(tl.div_rn(w, step), least, most, propagate_nan=tl.PropagateNan.ALL)
            q = (((q + ROUNDER) - ROUNDER) * step).to(DTYPE).to(tl.float32)
        if LEVELS:
            q = tl.load(values + row, mask=real, other=0)
            for level in range(1, LEVELS):
                above = w > tl.load(borders + (level - 1) * out + row, mask=real, other=0)
                q = tl.where(above, tl.load(values + level * out + row, mask=real, other=0), q)
        q = tl.where(removed, 0.0, q)
        e = (w - q) / tl.load(U + j * (u_row + u_column))
        tl.store(at_w + j * out, q, mask=real)
        tl.store(at_e + j * out, e, mask=real)
        u = tl.load(U + j * u_row + column * u_column, mask=(column > j) & (column < columns), other=0)
        w_all -= u[:, None] * e


@triton.jit
def _column(tile, column, j):
    """Return column j of a tile, (rows,)."""
    return tl.sum(tl.where(column[:, None] == j, tile, 0), 0)


@triton.jit
def _ranks(scores, column, start, width):
    """Rank each score among those of columns start … start + width − 1, ties in column order."""
    rank = tl.zeros_like(scores).to(tl.int32)
    for other in range(start, start + width):
        its = _column(scores, column, other)
        rank += ((its < scores) | ((its == scores) & (other < column)[:, None])).to(tl.int32)
    return rank
