"""Select the smallest scores of groups, and of matrices whose rows several processes share."""

import itertools

import torch

from mixgpt.common import distributed

NARROW = 64  # scores per group up to which pairwise comparison is as fast as sorting, or faster


def smallest_in_groups(scores, n):
    """Mark the n smallest scores of each group, the first ones of equals. Returns a mask like the scores.

    scores: (groups, m, rows), a group for each row. n: int or (rows,).
    """
    if scores.shape[1] > NARROW:
        return scores.argsort(dim=1, stable=True).argsort(dim=1) < n
    columns = scores.unbind(1)
    ranks = [torch.full_like(column, j, dtype=torch.uint8) for j, column in enumerate(columns)]
    for j, k in itertools.combinations(range(len(columns)), 2):
        less = (columns[k] < columns[j]).view(torch.uint8)  # only then the later one goes first
        ranks[j] += less
        ranks[k] -= less
    return torch.stack(ranks, 1) < n


def smallest(scores, ks, totals):
    """Mark exactly the k smallest scores of each of several matrices, even with ties. Returns masks like these.

    scores: (rows, in) of each, in several processes the shares of its rows, `totals` in number. ks: ints, or tensors on
    the scores' device, to avoid a host synchronization.
    """
    return [_smallest(whole.flatten(), k).view(whole.shape)[distributed.share(total)]
            for whole, k, total in zip(distributed.all_gather_shares(scores, totals), ks, totals, strict=True)]


def _smallest(values, k):
    mask = torch.zeros_like(values, dtype=torch.bool)
    if values.is_cuda:  # without a wait of the host
        order = values.argsort(stable=True)
        return mask.scatter_(0, order, torch.arange(len(values), device=values.device) < k)
    if not k:
        return mask
    value = values.kthvalue(k).values
    mask, like, missing = values <= value, values == value, k - (values < value).sum()
    if like.sum() > missing:
        mask &= ~like | (like.cumsum(0) <= missing)
    return mask
