"""Walk over the columns of matrices: prune, quantize, and let the columns to come compensate (arXiv 2301.00774).

Notation as in `sparsegpt`: W (out, in), H + λI = R Rᵀ with R upper triangular, U = R⁻¹.
"""

import itertools

import numpy as np
import torch

from mixgpt.kernels import columns
from mixgpt.kernels.matmul import suits, times_transposed
from quant import Grid, find_grid

WIDE = 512  # columns that are updated in one product from all columns before them
NARROW = 128  # columns of a triangular matrix that LAPACK inverts as fast as products would


def obs_saliency(W, h, u):
    """Score weights by the loss that removing them adds, after compensation.

    W: (out, in). h: (in,), diagonal of H (not used). u: (in,), diagonal of U. Returns (out, in).
    SparseGPT (arXiv 2301.00774), eq. 3: w² / [H⁻¹]_mm, and [H⁻¹]_mm = u_m² for the columns not yet processed.
    """
    return (W / u) ** 2


def isc_saliency(W, h, u):
    """Score weights by the loss that removing them adds, before and after compensation.

    W: (out, in). h: (in,), diagonal of H. u: (in,), diagonal of U. Returns (out, in).
    MixGPT (arXiv 2310.09499), eq. 4: w² (H_mm + 1 / [H⁻¹]_mm), with [H⁻¹]_mm = u_m². The released code divides by u_m.
    """
    return W**2 * (h + 1 / u**2)


# each w² times a factor of the column; with fisher, rows have a factor, too: `row_weights`
SALIENCIES = {"obs": obs_saliency, "isc": isc_saliency, "fisher": obs_saliency}


def smallest(scores, k):
    """Mark the k smallest scores, exactly k of them also among ties. Returns a mask like `scores`."""
    if scores.dim() == 2 and scores.stride(0) < scores.stride(1):  # in the order of memory, without a copy
        return smallest(scores.t(), k).t()
    flat = scores.flatten()
    if flat.device.type == "cpu" and k:  # numpy selects two to three times faster than topk
        mask = flat <= np.partition(flat.numpy(), k - 1)[k - 1].item()
        if mask.count_nonzero() == k:
            return mask.view_as(scores)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(k, largest=False, sorted=False).indices] = True
    return mask.view_as(scores)


def upper_inverse(R):
    """Return the inverse of R (n, n), upper triangular."""
    n = len(R)
    if n <= NARROW or not suits(R):
        return torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True)
    U, left, right = torch.zeros_like(R), slice(0, n // 2), slice(n // 2, n)  # most of it by products
    U[left, left], U[right, right] = upper_inverse(R[left, left]), upper_inverse(R[right, right])
    U[left, right] = -U[left, left] @ (R[left, right] @ U[right, right])
    return U


def prune_matrix(W, R, h, *target, **options):
    """Prune and quantize one matrix; see `prune_matrices`. target: sparsity, prunen, prunem. Returns Ŵ and its Grid."""
    return prune_matrices([W], R, h, [target], **options)[0]


def prune_matrices(matrices, R, h, targets, blocksize=128, saliency=obs_saliency, scheme=None, dtype=torch.float32,
                   row_weights=None):
    """Prune and quantize matrices that read the same input, and let their remaining columns compensate each error.

    SparseGPT, algorithm 1. matrices: (out, in) each, float32 or float64; walked together, stacked. R: (in, in) from
    `factor`. h: (in,), diagonal of H without damping. targets: (sparsity, prunen, prunem) of each, the latter two 0
    where left out. round(sparsity · numel) weights become 0, spread evenly over blocks of `blocksize` columns, those
    that are rounded to 0 among them, as nearly as these can be foreseen in the last block; with prunem > 0, the same
    for all, instead prunen weights of every prunem consecutive ones of a row, chosen when the
    walk reaches the group. saliency: ranks them, one of SALIENCIES or another that is w² times a factor of the column.
    scheme: a quant.Scheme; every weight that is kept is rounded to a grid found when the walk reaches its columns
    (GPTQ, arXiv 2210.17323). dtype: in which grid values must be exact. row_weights: (rows of all,), factors of the
    scores of each row.
    Weights that are 0 stay 0, also where that is more than was asked for.
    Returns a list of new matrices (out, in), each with its quant.Grid, None without a scheme.
    Raises ValueError where prunem or the group size does not divide the columns, or neither the other.

    Columns that no input reaches (h = 0) are free to prune: they go first, and keep their weights otherwise.
    """
    walk = _Walk(matrices, R, h, saliency, targets, blocksize, scheme, dtype, row_weights)
    W = walk.run().t()
    if scheme:
        W += 0.0  # −0 of the grid becomes 0
    return [(W[rows], walk.grid(rows)) for rows in walk.rows]


class _Walk:
    """One pass over the columns of stacked matrices.

    Columns lie in nested ranges of decreasing width. On entering a range all its columns receive what the columns
    before it leave to compensate, in one matrix product: so a whole range is up to date when its first column is
    reached, and that is when its mask and its grid are chosen.

    With P the columns before a range B of the first level and D = W − Ŵ there, B receives D_P R_PB R_BB⁻¹, so that
    only the small R_BB is inverted. Within B, whose U = R_BB⁻¹ is at hand then, it is −E U as in the paper, E the
    errors over the diagonal of U.
    """

    def __init__(self, matrices, R, h, saliency, targets, blocksize, scheme, dtype, row_weights):
        # (in, out) here, where oneDNN multiplies with contiguous rows, else with contiguous columns
        self.rowwise = suits(R, *matrices)
        self.W = torch.cat(matrices).t() if self.rowwise else torch.cat([W.t() for W in matrices], dim=1)
        self.columns = len(self.W)
        self.D = [] if self.rowwise else torch.empty_like(self.W)  # a list of W − Ŵ by ranges, (out, range) each
        self.mask = self.W == 0  # weights pruned before stay 0
        self.R = R
        factors = saliency(torch.ones_like(h)[None], h, 1 / R.diagonal())[0]
        self.factors = factors.masked_fill(h == 0, 0)
        self.row_weights = row_weights
        stops = list(itertools.accumulate(map(len, matrices)))
        self.rows = [slice(stop - len(W), stop) for stop, W in zip(stops, matrices, strict=True)]
        sparsities, prunens, prunems = zip(*((*target, 0, 0)[:3] for target in targets), strict=True)
        self.sparsities, self.prunens, self.prunem = sparsities, prunens, prunems[0]
        self.zeros, self.block = [0] * len(matrices), slice(0, 0)  # before the last block, and where it was
        self.scheme, self.dtype = scheme, dtype
        self.groupsize = 0 if scheme is None else self.columns if scheme.groupsize == -1 else scheme.groupsize
        self.grids = []
        # masks of n:m are chosen column group by column group, where no grid is finer
        self.chosen_inside = 0 < self.prunem and not 0 < self.groupsize < self.prunem
        self.widths = self._nest(blocksize)
        self.walk_columns = columns.fastest(self.W.device, dtype if scheme else None, self.W.dtype)

    def _nest(self, blocksize):
        """Return the widths of the ranges, such that those with a mask or a grid of their own are among them."""
        m, g = self.prunem or 1, self.groupsize or 1
        for name, width in {"prunem": m, "groupsize": g}.items():
            if self.columns % width:
                raise ValueError(f"{name} {width} does not divide the {self.columns} columns")
        if m % g and g % m:
            raise ValueError(f"prunem {m}, groupsize {g}: one must divide the other")
        block = max(blocksize, m)
        for unit in sorted({m, g}):  # whole groups of both kinds where they fit in
            block = block // unit * unit or block
        self.unit = self.prunem or block  # columns whose mask is chosen at once
        widths = {max(WIDE // block, 1) * block, block}
        if 0 < self.groupsize < self.columns:  # else the only grid is there from the start
            widths.add(g)
        if not self.chosen_inside:
            widths.add(self.unit)
        return sorted(widths, reverse=True)

    def run(self):
        """Walk all columns. Returns the new weights, (in, out)."""
        if self.groupsize == self.columns:
            self._choose_grid(0, self.columns)
        top = self.widths[0]
        for start in range(0, self.columns, top):
            B = slice(start, min(start + top, self.columns))
            self.U = upper_inverse(self.R[B, B])
            before = self.W[B].clone()
            if start:
                self._receive(B)
            self.E, self.start = torch.empty_like(before), start
            self._enter(B.start, B.stop, self.widths)
            before -= self.W[B]
            if self.rowwise:
                self.D.append(before.t())
            else:
                self.D[B] = before
        return self.W

    def _receive(self, B):
        """Let a range of the first level compensate the errors of all columns before it."""
        if not self.rowwise:
            self.W[B].addmm_(self.U.t(), self.R[:B.start, B].t() @ self.D[:B.start])
            return
        received = None
        for number, D in enumerate(self.D):
            P = slice(number * self.widths[0], (number + 1) * self.widths[0])
            received = times_transposed(D, self.R[P, B].t(), received)
        self.W[B] += times_transposed(received, self.U.t()).t()

    def _enter(self, left, right, widths):
        """Walk columns left … right − 1, which are up to date, in ranges of the first of `widths`."""
        width, *finer = widths
        for start in range(left, right, width):
            stop = min(start + width, right)
            if start > left:
                done, now = slice(left - self.start, start - self.start), slice(start - self.start, stop - self.start)
                self.W[start:stop].addmm_(self.U[done, now].t(), self.E[done], alpha=-1)
            if width == self.unit and not self.chosen_inside:
                self._choose_mask(start, stop)
            if width == self.groupsize < self.columns:
                self._choose_grid(start, stop)
            if finer:
                self._enter(start, stop, finer)
            else:
                self._walk(start, stop)

    def _choose_mask(self, start, stop):
        counts = [0] * len(self.rows) if self.prunem else self._counts(start, stop)
        self._mark_least(self.mask[start:stop], start, stop, counts)

    def _counts(self, start, stop):
        """Return how many weights of each matrix go in the block of columns start … stop − 1."""
        # cumulative counts: the last block meets the total exactly, but for what is rounded to 0 there
        counts = [round(sparsity * ((rows.stop - rows.start) * stop))
                  for sparsity, rows in zip(self.sparsities, self.rows, strict=True)]
        if self.scheme is None:
            counts, self.zeros = [count - zeros for count, zeros in zip(counts, self.zeros, strict=True)], counts
            return counts
        before, self.block = self.block, slice(start, stop)
        if not any(counts):
            return counts
        W, mask, growth = self.W[before], self.mask[before], (stop - start) / max(start - before.start, 1)
        for i, rows in enumerate(self.rows):
            zeros, removed = (W[:, rows] == 0).sum().item(), mask[:, rows].sum().item()
            self.zeros[i] += zeros
            counts[i] -= self.zeros[i] + round((zeros - removed) * growth)  # as many are rounded to 0 again
        return [max(count, 0) for count in counts]

    def _mark_least(self, mask, start, stop, counts):
        """Set in `mask` the least salient weights of each matrix in columns start … stop − 1, as things are."""
        scores = self.W[start:stop].square().mul_(self.factors[start:stop, None])
        if self.row_weights is not None:
            scores.mul_(self.row_weights)
        scores.masked_fill_(self.mask[start:stop], -1)
        for rows, count, n in zip(self.rows, counts, self.prunens, strict=True):
            if self.prunem:
                mask[:, rows] |= columns.smallest_in_groups(scores[:, rows], n, self.prunem)
            else:
                mask[:, rows] |= smallest(scores[:, rows], count)

    def _choose_grid(self, start, stop):
        pruned = self.mask[start:stop]
        if self.chosen_inside or stop > start // self.unit * self.unit + self.unit:  # masks not known yet
            pruned = pruned.clone()
            self._mark_least(pruned, start, stop, [
                round(sparsity * ((rows.stop - rows.start) * (stop - start)))
                for sparsity, rows in zip(self.sparsities, self.rows, strict=True)])
        self.grids.append(find_grid(self.W[start:stop].t(), pruned.t(), self.scheme, self.dtype))

    def _walk(self, start, stop):
        """Walk columns start … stop − 1 one by one."""
        here, grid, prunens = slice(start - self.start, stop - self.start), None, None
        if self.chosen_inside:
            prunens = list(zip(self.rows, self.prunens, strict=True))
        if self.scheme:
            scale, zero = self.grids[-1]
            grid = scale, -zero, 2**self.scheme.wbits - 1 - zero, self.dtype
        self.walk_columns(self.W[start:stop], self.E[here], self.U[here, here], self.mask[start:stop],
                          self.factors[start:stop], self.prunem if self.chosen_inside else 0, prunens, grid)

    def grid(self, rows):
        """Return the grids of a matrix, in the order of the walk."""
        if self.scheme is None:
            return None
        scale, zero = (torch.stack(values, 1)[rows] for values in zip(*self.grids, strict=True))
        group = torch.arange(self.columns, dtype=torch.int32, device=self.W.device) // self.groupsize
        return Grid(self.scheme, scale.to(self.dtype), zero.to(torch.uint8), group)
