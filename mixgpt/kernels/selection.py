"""Mark the least salient weights of a block of columns: the reference for any device, and the choice of a kernel."""

import torch

from mixgpt.kernels import columns
from mixgpt.kernels.linalg import smallest


def scores_of(W, mask, factors, row_weights=None):
    """Return the saliencies w² · factors · row_weights of W (n, out), −1 where the mask (n, out) is set already.

    factors: (n,). row_weights: (out,), default 1.
    """
    scores = W.square().mul_(factors[:, None])
    if row_weights is not None:
        scores.mul_(row_weights)
    return scores.masked_fill_(mask, -1)


def mark_smallest(W, mask, marked, factors, row_weights, matrices):
    """Mark the least of `scores_of` a block of columns of several matrices, exactly as many as each asks for.

    marked: (n, out), to which the marks are added; it may be the mask itself. matrices: [(slice of out, count)], count
    an int, or a tensor on the device.
    """
    scores = scores_of(W, mask, factors, row_weights)
    chosen = smallest([scores[:, rows] for rows, _ in matrices], [count for _, count in matrices])
    for (rows, _), mask in zip(matrices, chosen, strict=True):
        marked[:, rows] |= mask


def fastest(device, dtype):
    """Return the fastest `mark_smallest` for a device and W's dtype."""
    if device.type == "cuda" and dtype == torch.float32 and columns.triton_obstacle(device) is None:
        from mixgpt.kernels import selection_cuda  # only with a GPU
        return selection_cuda.mark_smallest
    return mark_smallest
