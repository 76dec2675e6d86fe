"""Select the smallest scores: of rows, of matrices, and of matrices whose rows several processes share."""

import numpy as np
import torch

from mixgpt.common import distributed

NARROW = 8  # scores per row up to which pairwise comparison is faster than selection


def smallest_per_row(scores, n):
    """Mark the n smallest scores of every row. scores: (rows, m). Returns a mask (rows, m)."""
    if scores.shape[1] > NARROW:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        return mask.scatter_(1, scores.topk(n, dim=1, largest=False, sorted=False).indices, True)
    mask, columns = torch.empty_like(scores, dtype=torch.bool), scores.unbind(1)
    for j, column in enumerate(columns):
        rank = torch.zeros(len(scores), dtype=torch.uint8, device=scores.device)
        for k, other in enumerate(columns):
            if k != j:
                rank += other <= column if k < j else other < column
        torch.lt(rank, n, out=mask[:, j])
    return mask


def smallest_in_groups(scores, n, m):
    """Mark the n smallest scores of every m consecutive columns of a row. scores: (in, out). Returns a mask like it."""
    groups = scores.t().reshape(-1, m)
    return smallest_per_row(groups, n).view(scores.t().shape).t()


def kth_smallest(values, k):
    """Return the k-th smallest of some values, a tensor of one; in several processes, of the float32 ones of all."""
    if distributed.world() > 1:
        return _of_all(values, k)[0]
    if values.device.type == "cpu":  # numpy selects in a fifth of the time
        return torch.from_numpy(np.partition(values.numpy(), k - 1)[k - 1:k])
    return values.kthvalue(k).values


def _of_all(values, k):
    """Return the k-th smallest of the float32 values of all processes, and how many like it count in this process.

    The k smallest are those below it and as many like it as are missing, from the first process on. This is a radix
    selection: values are ordered like integers of their bits, whose digits all processes count, the highest first.
    """
    bits = (values + 0.0).view(torch.int32).long()  # −0 becomes 0
    keys = torch.where(bits < 0, -(2**31) - 1 - bits, bits) + 2**31
    prefix = 0
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        digits = keys[keys >> shift + width == prefix] >> shift & 2**width - 1
        counts = torch.stack(distributed.all_gather(digits.bincount(minlength=2**width))).cpu()  # (processes, digits)
        ends = counts.sum(0).cumsum(0)
        digit = int((ends < k).sum())
        prefix, k = prefix << width | digit, k - int(ends[digit] - counts[:, digit].sum())
    key = prefix - 2**31
    value = torch.tensor([key if key >= 0 else -(2**31) - 1 - key], dtype=torch.int32).view(torch.float32)
    return value.to(values.device), k - int(counts[:distributed.rank(), digit].sum())


def smallest(scores, k):
    """Mark exactly the k smallest of some scores, even with ties. Returns a mask like these.

    k: an int, or a tensor on the scores' device, to avoid a host synchronization. In several processes, the k smallest
    of the scores of all of them, see `kth_smallest`.
    """
    by_columns = scores.dim() == 2 and scores.stride(0) < scores.stride(1)
    values = (scores.t() if by_columns else scores).flatten()  # in memory order, without a copy
    mask = torch.zeros_like(values, dtype=torch.bool)
    if distributed.world() > 1:
        mask = _up_to(values, *_of_all(values, int(k)))
    elif values.is_cuda:  # without a wait of the host
        mask.scatter_(0, values.argsort(stable=True), torch.arange(len(values), device=values.device) < k)
    elif k:
        value = kth_smallest(values, k)
        mask = _up_to(values, value, k - (values < value).sum())
    return mask.view(scores.shape[::-1]).t() if by_columns else mask.view(scores.shape)


def _up_to(values, value, most):
    """Mark what is less than a value, and at most so many of those like it, the first in memory."""
    mask, like = values <= value, values == value
    if values.is_cuda or like.sum() > most:  # the host does not wait for a GPU
        mask &= ~like | (like.cumsum(0) <= most)
    return mask
