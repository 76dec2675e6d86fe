"""The choice among several ranges of a grid, compiled for the CPU; see `ranges.closest`."""

import numba
import numpy as np
import torch


def closest(W, importance, scale, low, high):
    """Find the grid closest to each row of W on the host; arguments as in `ranges.closest`."""
    best = torch.zeros(len(W), dtype=torch.int64)
    _closest(*(x.contiguous().numpy() for x in (W, importance, scale, low, high, best)))
    return best


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _closest(W, importance, scale, low, high, best):
    """Write the index of each row's grid to best. A row stays in L1 cache while all grids are tried."""
    rows, columns = W.shape
    for r in range(rows):
        least = W.dtype.type(np.inf)
        for k in range(len(scale)):
            step, bottom, top, error = scale[k, r], low[k, r], high[k, r], W.dtype.type(0)
            for j in range(columns):
                e = min(max(np.rint(W[r, j] / step), bottom), top) * step - W[r, j]
                error += importance[j] * e * e
            if error < least:
                least, best[r] = error, k
