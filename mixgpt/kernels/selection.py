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


def kth_smallest(vectors, ks):
    """Return the k-th smallest of each of several vectors, each as a tensor of one value.

    In several processes, of the vectors of all processes together, which are float32 then.
    """
    if distributed.world() > 1:
        return [value.to(vectors[0].device) for value, _ in _of_all(vectors, ks)]
    return [_kth_smallest(values, k) for values, k in zip(vectors, ks, strict=True)]


def _kth_smallest(values, k):
    if values.device.type == "cpu":  # numpy selects in a fifth of the time
        return torch.from_numpy(np.partition(values.numpy(), k - 1)[k - 1:k])
    return values.kthvalue(k).values


def _of_all(vectors, ks):
    """Return the k-th smallest of several vectors of all processes, and how many like it count in this process.

    The k smallest are those below it and as many like it as are missing, from the first process on. Processes exchange
    the values around the place that the k-th would have if their vectors were alike, and wider ranges until it lies
    within all of them.
    """
    places = [(k // distributed.world(), k // distributed.world() // 8 + 64) for k in ks]
    while True:
        windows = [_around(values, place, half) for values, (place, half) in zip(vectors, places, strict=True)]
        parts = [part.cpu().numpy() for part in distributed.all_gather(
            torch.from_numpy(np.concatenate(windows)).to(vectors[0].device))]
        bounds = np.cumsum([len(window) for window in windows])[:-1]
        last = [_merged(of_vector, k) for of_vector, k in
                zip(zip(*(np.split(part, bounds) for part in parts), strict=True), ks, strict=True)]
        if all(last):
            return last
        places = [(place, 4 * half) for place, half in places]


def _around(values, place, half):
    """Return the values of a vector whose places in order are within `half` of one, behind three numbers, as int32.

    Of the numbers, two say how many values are below and in the window, one how many there are. It has a fixed size.
    """
    n, window = len(values), np.zeros(3 + 2 * half, np.int32)
    start, stop = max(min(place, n) - half, 0), min(place + half, n)
    if stop > start:
        window[3:3 + stop - start].view(np.float32)[:] = _between(values, start, stop)
    window[:3] = start, stop - start, n
    return window


def _between(values, start, stop):
    """Return the values of a vector whose places in order are start … stop − 1, as a numpy array in any order."""
    if values.device.type != "cpu":
        return values.sort().values[start:stop].cpu().numpy()
    below = np.partition(values.numpy(), stop - 1)[:stop]  # numpy is slower where it selects two at a time
    return np.partition(below, start)[start:]


def _merged(windows, k):
    """Return the k-th smallest of what `_around` gives in all processes, and how many like it count here, or None."""
    below, _, total = (sum(int(window[place]) for window in windows) for place in range(3))
    inside = [window[3:3 + window[1]].view(np.float32) for window in windows]
    together, left = np.concatenate(inside), min(max(k, 1), total) - below
    if not 0 < left <= len(together):
        return None
    value = np.partition(together, left - 1)[left - 1]
    for (start, count, n), own in zip((window[:3] for window in windows), inside, strict=True):
        if start and own.min() >= value or start + count < n and own.max() <= value:
            return None
    before = sum(np.count_nonzero(own == value) for own in inside[:distributed.rank()])
    return torch.tensor([value]), int(k - below - np.count_nonzero(together < value) - before)


def smallest(scores, ks):
    """Mark exactly the k smallest of each of several tensors of scores, even with ties. Returns masks like these.

    ks: ints, or tensors on the scores' device, to avoid a host synchronization. In several processes, the k smallest of
    the scores of all of them, see `kth_smallest`.
    """
    # in memory order, without a copy
    by_columns = [part.dim() == 2 and part.stride(0) < part.stride(1) for part in scores]
    flat = [(part.t() if turned else part).flatten() for part, turned in zip(scores, by_columns, strict=True)]
    if distributed.world() > 1:
        marked = [_up_to(values, value.to(values.device), most) for values, (value, most) in
                  zip(flat, _of_all(flat, list(map(int, ks))), strict=True)]
    else:
        marked = [_smallest(values, k) for values, k in zip(flat, ks, strict=True)]
    return [mask.view(part.shape[::-1]).t() if turned else mask.view(part.shape)
            for mask, part, turned in zip(marked, scores, by_columns, strict=True)]


def _smallest(values, k):
    mask = torch.zeros_like(values, dtype=torch.bool)
    if values.is_cuda:  # without a wait of the host
        order = values.argsort(stable=True)
        return mask.scatter_(0, order, torch.arange(len(values), device=values.device) < k)
    if not k:
        return mask
    value = _kth_smallest(values, k)
    return _up_to(values, value, k - (values < value).sum())


def _up_to(values, value, most):
    """Mark what is less than a value, and at most so many of those like it, the first in memory."""
    mask, like = values <= value, values == value
    if values.is_cuda or like.sum() > most:  # the host does not wait for a GPU
        mask &= ~like | (like.cumsum(0) <= most)
    return mask
