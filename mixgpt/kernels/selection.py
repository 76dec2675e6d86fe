"""Select the smallest scores of groups, and of matrices whose rows several processes share."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mixgpt.common import distributed

NARROW = 64  # Up to so many scores per group, pairwise comparison is as fast as sorting, or faster.


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


def smallest(scores: Sequence[Tensor], ks: Sequence[int | Tensor], totals: Sequence[int]) -> list[Tensor]:
    """Mark exactly the k smallest scores of each of several matrices, even with ties. Returns boolean masks.

    scores: matrices (rows, in); with several processes, each passes its share of the `totals` rows. ks: ints, or
    tensors on the scores' device, which spare the host a synchronization.
    """
    masks = []
    for whole, k, total in zip(distributed.all_gather_shares(scores, totals), ks, totals, strict=True):
        values = whole.flatten()
        mask = torch.zeros_like(values, dtype=torch.bool)
        if values.is_cuda:  # Sorting does not make the host wait for the GPU.
            order = values.argsort(stable=True)
            mask.scatter_(0, order, torch.arange(len(values), device=values.device) < k)
        elif k:
            value = kth_smallest(values, int(k))
            mask, like, missing = values <= value, values == value, k - (values < value).sum()
            if like.sum() > missing:
                mask &= ~like | (like.cumsum(0) <= missing)
        masks.append(mask.view(whole.shape)[distributed.share(total)])
    return masks
