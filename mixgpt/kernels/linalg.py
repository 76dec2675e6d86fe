"""Triangular factors, products with symmetric matrices, and selection of the smallest scores."""

import numpy as np
import torch

from mixgpt.common import distributed
from mixgpt.kernels.matmul import suits, times_transposed

PANEL = 256  # columns factored at a time
STRIP = 2048  # columns of a product that occupy all of a GPU
SMALL = 128  # columns up to which LAPACK inverts a triangular matrix as fast as blocked products


def damping(h, percdamp):
    """Return λ = percdamp · mean(diag H), of h (in,), the diagonal of H."""
    mean = h.mean()
    return torch.where(mean > 0, percdamp * mean, 1.0)  # an all-zero input has no scale


def upper_cholesky(H, damping):
    """Return R (in, in), upper triangular with H + damping · I = R Rᵀ, and whether that is positive definite, a tensor.

    H: (in, in), symmetric; only its upper triangle is read.
    """
    if not suits(H) or len(H) <= 3 * PANEL:
        damped = H.flip(0, 1)  # the Cholesky factor of the flipped matrix, flipped back, is upper triangular
        damped.diagonal().add_(damping)
        L, info = torch.linalg.cholesky_ex(damped)
        return L.flip(0, 1), info == 0
    # the same by panels, last to first, with fast products, which MKL's factorisation does not use
    R, panels = torch.zeros_like(H), []
    for stop in range(len(H), 0, -PANEL):
        B = slice(max(stop - PANEL, 0), stop)
        rest = H[:stop, B].contiguous()
        for panel in panels:
            rest = times_transposed(panel[:stop], -panel[B], rest)
        R_B, is_positive = upper_cholesky(rest[B], damping)
        if not is_positive:
            return R, is_positive
        R[B, B] = R_B
        if B.start:
            above = times_transposed(rest[:B.start], upper_inverse(R_B))
            R[:B.start, B] = above
            panels.append(above)
    return R, is_positive


def upper_inverse(R):
    """Return the inverse of R (n, n), upper triangular."""
    n = len(R)
    if n <= SMALL or not suits(R):
        return torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True)
    U, left, right = torch.zeros_like(R), slice(0, n // 2), slice(n // 2, n)  # mostly by matrix products
    U[left, left], U[right, right] = upper_inverse(R[left, left]), upper_inverse(R[right, right])
    U[left, right] = -U[left, left] @ (R[left, right] @ U[right, right])
    return U


def upper_blocks(columns, device):
    """Return the column blocks for symmetric products; each block needs only the rows up to its end.

    Narrower blocks save little and multiply slower, on a GPU by far: there each block should occupy all of it.
    """
    width = max(192, columns // 8)
    if device.type == "cuda":
        count = min(-(-columns // STRIP), 8)
        width = -(-columns // count // 256) * 256  # whole tiles of a product
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def rowwise_quadratic_form(A, H):
    """Return the diagonal of A H Aᵀ, ‖a X‖² for every row a of A (rows, in). H: (in, in), symmetric."""
    if suits(A, H):  # copying blocks of A would cost more than the lower half
        return torch.linalg.vecdot(times_transposed(A, H), A)
    total = torch.zeros(len(A), dtype=A.dtype, device=A.device)
    for B in upper_blocks(A.shape[1], A.device):
        A_B = A[:, B]
        AH = A_B @ H[B, B]
        if B.start:
            AH.addmm_(A[:, :B.start], H[:B.start, B], alpha=2)  # blocks above the diagonal count twice
        total += torch.linalg.vecdot(AH, A_B)
    return total


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
