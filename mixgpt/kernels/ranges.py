"""Choose among several ranges of a grid: the reference for any device, and the choice of a kernel."""

import torch

from mixgpt.kernels import ranges_cpu
from mixgpt.kernels.columns import to_multiples


def closest(W, importance, scale, low, high):
    """Find the grid closest to each row of W: that with the least sum of importance · (w − q)², the first of equals.

    W: (out, n). importance: (n,). scale, low, high: (grids, out), as in `columns.to_multiples`. Returns the index of
    the row's grid, (out,).
    """
    least, best = torch.full_like(scale[0], torch.inf), torch.zeros_like(scale[0], dtype=torch.int64)
    for index, grid in enumerate(zip(scale, low, high, strict=True)):
        error = to_multiples(W, *(x[:, None] for x in grid), W.dtype).sub_(W).square_() @ importance
        best.masked_fill_(error < least, index)
        least = torch.minimum(error, least)
    return best


def fastest(device):
    """Return the fastest `closest` for a device."""
    return ranges_cpu.closest if device.type == "cpu" else closest
