"""Select the smallest scores of groups, and of matrices whose rows several processes share."""

import itertools
from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from mixgpt.common import distributed

NARROW = 64  # Up to so many scores per group, pairwise comparison is as fast as sorting, or faster.
DIGIT = 12  # So many bits of scores are counted at a time: more would make more counts than a small matrix has scores.


def compiled(function: Callable) -> Callable:
    """Let numba compile a function when it is called, and keep the code on disk if there is a place for that."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # Neither the function's folder nor the user's cache can be written.
        return numba.njit(**options)(function)


def smallest_in_groups(scores: Tensor, n: int | Tensor) -> Tensor:
    """Mark the n smallest scores of each group; among equal scores the earlier ones go first.

    scores: (groups, m, rows), with one group per row. n: an int, or (rows,). Returns a boolean mask like the scores.
    """
    if scores.shape[1] > NARROW:
        return scores.argsort(dim=1, stable=True).argsort(dim=1) < n
    columns = scores.unbind(1)
    ranks = [torch.full_like(column, j, dtype=torch.uint8) for j, column in enumerate(columns)]
    for j, k in itertools.combinations(range(len(columns)), 2):
        less = (columns[k] < columns[j]).view(torch.uint8)  # The later score goes first only if it is smaller.
        ranks[j] += less
        ranks[k] -= less
    return torch.stack(ranks, 1) < n


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of values (n,), 1 ≤ k ≤ n, as a tensor () on their device."""
    if values.is_cuda:
        return values.kthvalue(k).values
    return torch.from_numpy(np.partition(values.numpy(), k - 1))[k - 1]  # kthvalue takes ten times as long.


def smallest(scores: Sequence[Tensor], ks: Sequence[int | Tensor] | Callable[[Tensor], Sequence[int | Tensor]],
             own: Tensor | None = None) -> list[Tensor]:
    """Mark exactly the k smallest scores of each of several matrices, even with ties. Returns boolean masks.

    scores: matrices (rows, in), float32 or float64, all below 0 alike; with several processes, each passes its share of
    the rows. ks: ints, or tensors on the scores' device, which spare the host a synchronization; or a function that
    returns them, given the sums of `own` (n,), integers, over all processes. A radix select: floats from 0 on sort like
    their bits. Exchanged are how many scores have which upper bits, then which lower bits those in question have.
    """
    bits, device = 8 * scores[0].itemsize, scores[0].device
    keys = [part.flatten().view(torch.int32 if bits == 32 else torch.int64).clamp_min(-1).add_(1) for part in scores]
    own = torch.empty(0, dtype=torch.int32, device=device) if own is None else own.int()
    thresholds = missing = torch.zeros(len(keys), 1, dtype=torch.int64, device=device)
    for before, shift in itertools.pairwise([bits - 1, *range(bits - 1 - DIGIT, 0, -DIGIT), 0]):  # The sign bit is 0.
        counts = torch.stack([_count(part, before - shift, shift, begin)
                              for part, begin in zip(keys, thresholds, strict=True)])
        if shift:
            distributed.all_reduce(own, counts)
        else:
            each, = distributed.all_gather_shares([counts[None]], [distributed.world()])
            counts = each.sum(0)
        if before == bits - 1:
            each_k, own = ks(own) if callable(ks) else ks, own[:0]
            missing = torch.stack([k if torch.is_tensor(k) else torch.full((), k, device=device)
                                   for k in each_k])[:, None]
        sums = counts.cumsum(1)
        digits = torch.searchsorted(sums, missing)
        missing = missing - sums.gather(1, digits) + counts.gather(1, digits)
        thresholds = thresholds << before - shift | digits
    # Of equal scores, a process takes those that the processes before it leave.
    missing, masks = missing - each[:distributed.rank()].sum(0).gather(1, digits), []
    equal = each[distributed.rank()].gather(1, digits)
    thresholds = thresholds.to(keys[0].dtype)
    for part, key, threshold, left, count in zip(scores, keys, thresholds, missing, equal, strict=True):
        mask = key <= threshold
        if mask.is_cuda or count > left:  # The host does not wait for a GPU.
            like = key == threshold
            mask &= ~like | (like.cumsum(0) <= left)
        masks.append(mask.view(part.shape))
    return masks


def _count(keys: Tensor, bits: int, shift: int, begin: Tensor) -> Tensor:
    """Count how often `bits` bits above the lowest `shift` have each value, in keys where those above are `begin`."""
    counts = torch.zeros(1 << bits, dtype=torch.int32, device=keys.device)
    if not keys.is_cuda:
        _count_compiled(keys.numpy(), shift, int(begin), counts.numpy())
        return counts
    digits = keys >> shift & len(counts) - 1
    return counts.scatter_add_(0, digits.long(), (keys >> shift + bits == begin).int())


@compiled
def _count_compiled(keys: np.ndarray, shift: int, begin: int, counts: np.ndarray) -> None:
    """Do the same on the host."""
    for key in keys:
        digit = (key >> shift) - begin * len(counts)
        if 0 <= digit < len(counts):
            counts[digit] += 1
