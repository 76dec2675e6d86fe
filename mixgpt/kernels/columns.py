"""Walk over the columns of a narrow range one by one: the reference for any device, and the choice of a kernel."""

import functools
from typing import NamedTuple

import torch

from mixgpt.kernels import columns_cpu
from mixgpt.kernels.selection import smallest_in_groups


class UniformGrid(NamedTuple):
    """A function that rounds W to a multiple of scale, between low and high times it, as computed in `dtype`."""

    scale: torch.Tensor  # (out,), as the next two
    low: torch.Tensor
    high: torch.Tensor
    dtype: torch.dtype

    def __call__(self, W):
        """Round W (..., out). Returns W's dtype."""
        return (W / self.scale).round_().clamp_(self.low, self.high).mul_(self.scale).to(self.dtype).to(W.dtype)


def walk_columns(W, E, U, mask, choice, grid):
    """Prune or round the weights of each column in turn, compensating the error in the columns after it.

    W: (n, out), the columns of a range, updated for all errors before it; overwritten with the new weights. E: (n,
    out), overwritten with the errors divided by the diagonal of U. U: (n, n), upper triangular. mask: (n, out), the
    weights to prune. choice: (prunem, [(slice of rows, prunen)], factors (n,)), to choose here the prunen lowest scores
    w² · factors of every prunem weights of those rows, masked ones first; or None. grid: a function that rounds a
    column (out,), a UniformGrid for the compiled walks; or None.
    SparseGPT (arXiv 2301.00774), algorithm 1, and GPTQ (arXiv 2210.17323), eq. 2 and 3.
    """
    prunem, prunens, factors = choice or (0, [], None)
    for j in range(len(W)):
        if prunem and j % prunem == 0:
            group = slice(j, j + prunem)
            now = W[group] - U[:j, group].t() @ E[:j]
            scores = now.square_().mul_(factors[group, None]).masked_fill_(mask[group], -1)
            for rows, n in prunens:
                mask[group, rows] |= smallest_in_groups(scores[:, rows], n, prunem)
        w, e = W[j], E[j]
        w.addmv_(E[:j].t(), U[:j, j], alpha=-1)
        q = w if grid is None else grid(w)
        q = q.masked_fill(mask[j], 0)
        torch.sub(w, q, out=e).div_(U[j, j])
        w.copy_(q)


@functools.cache
def triton_obstacle(device):
    """Return why the Triton kernel cannot run on a GPU, trying it once; None if it can."""
    try:
        from mixgpt.kernels import columns_cuda  # only with a GPU
    except (ImportError, OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    return columns_cuda.obstacle(device)


def fastest(W, grid=None):
    """Return the fastest `walk_columns` for a matrix and a grid."""
    dtype, device = grid.dtype if isinstance(grid, UniformGrid) else W.dtype, W.device
    if grid is not None and not isinstance(grid, UniformGrid):
        return walk_columns
    if device.type == "cpu" and (dtype == W.dtype or W.dtype == torch.float32 and dtype in columns_cpu.GRID_DTYPES):
        return columns_cpu.walk_columns
    if device.type == "cuda" and W.dtype == torch.float32 and triton_obstacle(device) is None:
        from mixgpt.kernels import columns_cuda
        if dtype in columns_cuda.GRID_DTYPES:
            return columns_cuda.walk_columns
    return walk_columns
