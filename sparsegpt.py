"""SparseGPT (arXiv 2301.00774): the Hessian of a layer's input, weight saliencies, and the walk over the columns.

Notation: Y = X Wᵀ with W (out, in); H = (2/N) Xᵀ X (in, in) over N sequences; H + λI = R Rᵀ with R upper triangular,
and U = R⁻¹, so that (H + λI)⁻¹ = Uᵀ U. The first diagonal entry of the inverse Hessian of the columns not yet
processed is U_mm² = 1/R_mm².
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mixgpt.common import distributed
from mixgpt.kernels import columns
from mixgpt.kernels.linalg import smallest, upper_inverse
from mixgpt.kernels.matmul import suits, times_transposed
from quant import Grid, Scheme, find_grid

WIDE = 512  # columns updated from all columns before them in one product


# ---- saliencies ------------------------------------------------------------------------------------------------


# The saliency of a weight is w² times a column factor. These functions return the column factors (in,) from
# h (in,), the diagonal of H, and u (in,), the diagonal of U. The walk's `row_weights` multiply saliencies per row.


def obs_saliency(h, u):
    """Score weights by the loss increase when they are removed, after compensation.

    SparseGPT (arXiv 2301.00774), eq. 3: w² / [H⁻¹]_mm, and [H⁻¹]_mm = u_m² for the columns not yet processed.
    """
    return (1 / u) ** 2


def isc_saliency(h, u):
    """Score weights by the loss increase when they are removed, before plus after compensation.

    MixGPT (arXiv 2310.09499), eq. 4: w² (H_mm + 1 / [H⁻¹]_mm), with [H⁻¹]_mm = u_m². The released code divides by u_m.
    """
    return h + 1 / u**2


# ---- the walk over the columns ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class WalkOptions:
    """Options of the walk over the columns."""

    blocksize: int = 128  # columns whose mask is chosen at once; each block gets an equal share of the sparsity
    saliency: Callable = obs_saliency
    scheme: Scheme | None = None  # quantization of the kept weights


def prune_matrix(W, R, h, *target, dtype=torch.float32, row_weights=None, **options):
    """Prune and quantize one matrix; see `prune_matrices`. target: sparsity, prunen, prunem. Returns Ŵ and its Grid."""
    return prune_matrices([W], R, h, [target], WalkOptions(**options), dtype, row_weights)[0]


def prune_matrices(matrices, R, h, targets, options=WalkOptions(), dtype=torch.float32, row_weights=None):  # noqa: B008
    """Prune and quantize matrices that read the same input, compensating each error in the remaining columns.

    SparseGPT, algorithm 1, and GPTQ (arXiv 2210.17323): kept weights are rounded to a grid that is chosen when the
    walk reaches its columns.

    matrices: (out, in) each, float32 or float64; stacked and walked together. R: (in, in) from `factor`. h: (in,),
    diagonal of H without damping. targets: (sparsity, prunen, prunem) per matrix, the latter two 0 if omitted.
    dtype: in which grid values must be exact. row_weights: (total rows,), factors of the saliencies per row.

    Prunes round(sparsity · numel) weights, spread evenly over column blocks. Weights quantized to zero count; the last
    block's number is an estimate. With prunem > 0 (the same for all matrices), prunes prunen of every prunem
    consecutive weights of a row instead, chosen when the walk reaches them. Zero weights stay zero, even if they exceed
    the target. In several processes, each has some of the rows of every matrix, and numbers are those of all rows.

    Returns a list of (new matrix (out, in), its quant.Grid or None without a scheme).
    Raises ValueError if prunem or the group size does not divide the columns, or neither divides the other.

    Columns whose input is always zero (h = 0) cost nothing to prune: they go first, and are otherwise unchanged.
    """
    return [(W, grid) for W, grid, _ in walk_matrices(matrices, R, h, targets, options, dtype, row_weights)]


def walk_matrices(matrices, R, h, targets, options, dtype=torch.float32, row_weights=None):
    """Do what `prune_matrices` does, and return the loss of the rows of each matrix, too: (Ŵ, grid, (out,)).

    The loss of a row d of W − Ŵ is d (H + λI) dᵀ: as D R are the errors E that the walk has at hand, it is ‖e‖².
    """
    walk = _Walk(matrices, R, h, targets, options, dtype, row_weights)
    W = walk.run().t()
    if options.scheme:
        W += 0.0  # −0 of the grid becomes 0
    return [(W[rows], walk.grid(rows), walk.losses[rows]) for rows in walk.rows]


class _Walk:
    """One pass over the columns of stacked matrices.

    Columns are split into nested ranges of decreasing width. On entering a range, one matrix product updates all its
    columns for the errors of the columns before it. The whole range is then up to date, and its mask and grid are
    chosen.

    For a top-level range B, with P the columns before it and D = W − Ŵ there, the update is D_P R_PB R_BB⁻¹, so only
    the small R_BB is inverted. Within B, U = R_BB⁻¹ is known and the update is −E U as in the paper, with E the errors
    divided by the diagonal of U.
    """

    def __init__(self, matrices, R, h, targets, options, dtype, row_weights):
        # (in, out): with contiguous rows where oneDNN does the products, else with contiguous columns
        self.rowwise = suits(R, *matrices)
        self.W = torch.cat(matrices).t() if self.rowwise else torch.cat([W.t() for W in matrices], dim=1)
        self.columns = len(self.W)
        self.D = [] if self.rowwise else torch.empty_like(self.W)  # a list of W − Ŵ per range, (out, range) each
        self.mask = self.W == 0  # zero weights stay zero
        self.losses = self.W.new_zeros(self.W.shape[1])  # ‖e‖² per row
        self.R, self.h = R, h
        self.factors = options.saliency(h, 1 / R.diagonal()).masked_fill(h == 0, 0)
        self.row_weights = row_weights
        stops = list(itertools.accumulate(map(len, matrices)))
        self.rows = [slice(stop - len(W), stop) for stop, W in zip(stops, matrices, strict=True)]
        self.totals = distributed.total([len(W) for W in matrices])  # rows of each matrix in all processes
        sparsities, prunens, prunems = zip(*((*target, 0, 0)[:3] for target in targets), strict=True)
        self.sparsities, self.prunens, self.prunem = sparsities, prunens, prunems[0]
        self.zeros, self.block = [0] * len(matrices), slice(0, 0)  # zeros before the last block, and its columns
        scheme = self.scheme = options.scheme
        self.dtype = dtype
        self.groupsize = 0 if scheme is None else self.columns if scheme.groupsize == -1 else scheme.groupsize
        self.grids = []
        # n:m masks are chosen one column group at a time, unless grids are narrower
        self.chosen_inside = 0 < self.prunem and not 0 < self.groupsize < self.prunem
        self.widths = self._nest(options.blocksize)
        self.walk_columns = columns.fastest(self.W.device, dtype if scheme else None, self.W.dtype)

    def _nest(self, blocksize):
        """Return the widths of the nested ranges, including those of a mask unit and of a grid group."""
        m, g = self.prunem or 1, self.groupsize or 1
        for name, width in {"prunem": m, "groupsize": g}.items():
            if self.columns % width:
                raise ValueError(f"{name} {width} does not divide the {self.columns} columns")
        if m % g and g % m:
            raise ValueError(f"prunem {m}, groupsize {g}: one must divide the other")
        block = max(blocksize, m)
        for unit in sorted({m, g}):  # whole groups of both kinds where they fit
            block = block // unit * unit or block
        self.unit = self.prunem or block  # columns whose mask is chosen at once
        widths = {max(WIDE // block, 1) * block, block}
        if 0 < self.groupsize < self.columns:  # else there is one grid, chosen at the start
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
            self.losses += torch.linalg.vector_norm(self.E, dim=0).square()
            before -= self.W[B]
            if self.rowwise:
                self.D.append(before.t())
            else:
                self.D[B] = before
        return self.W

    def _receive(self, B):
        """Update a top-level range for the errors of all columns before it."""
        if not self.rowwise:
            self.W[B].addmm_(self.U.t(), self.R[:B.start, B].t() @ self.D[:B.start])
            return
        received = None
        for number, D in enumerate(self.D):
            P = slice(number * self.widths[0], (number + 1) * self.widths[0])
            received = times_transposed(D, self.R[P, B].t(), received)
        self.W[B] += times_transposed(received, self.U.t()).t()

    def _enter(self, left, right, widths):
        """Walk columns left … right − 1, which are up to date, in ranges of width widths[0]."""
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
        """Return how many weights of each matrix to prune in the block of columns start … stop − 1.

        On a GPU, counts that depend on weights quantized to zero are tensors, so that the host does not synchronize.
        """
        # cumulative counts: the last block meets the total exactly, except for weights it quantizes to zero
        counts = [round(sparsity * (total * stop))
                  for sparsity, total in zip(self.sparsities, self.totals, strict=True)]
        if self.scheme is None:
            counts, self.zeros = [count - zeros for count, zeros in zip(counts, self.zeros, strict=True)], counts
            return counts
        before, self.block = self.block, slice(start, stop)
        if not any(counts):
            return counts
        W, mask, growth = self.W[before], self.mask[before], (stop - start) / max(start - before.start, 1)
        here = torch.stack([part[:, rows].sum() for rows in self.rows for part in (W == 0, mask)])
        distributed.all_reduce(here)
        for i, (zeros, removed) in enumerate(here.view(-1, 2)):
            self.zeros[i] = self.zeros[i] + zeros
            again = ((zeros - removed).double() * growth).round().long()  # expect as many to be rounded to 0 again
            count = (counts[i] - self.zeros[i] - again).clamp_min(0)
            counts[i] = count if self.W.is_cuda else int(count)
        return counts

    def _mark_least(self, mask, start, stop, counts):
        """Mark in `mask` the least salient current weights of each matrix in columns start … stop − 1."""
        scores = self.W[start:stop].square().mul_(self.factors[start:stop, None])
        if self.row_weights is not None:
            scores.mul_(self.row_weights)
        scores.masked_fill_(self.mask[start:stop], -1)
        if self.prunem:
            marked = [columns.smallest_in_groups(scores[:, rows], n, self.prunem)
                      for rows, n in zip(self.rows, self.prunens, strict=True)]
        else:
            marked = smallest([scores[:, rows] for rows in self.rows], counts)
        for rows, least in zip(self.rows, marked, strict=True):
            mask[:, rows] |= least

    def _choose_grid(self, start, stop):
        pruned = self.mask[start:stop]
        if self.chosen_inside or stop > start // self.unit * self.unit + self.unit:  # masks not known yet
            pruned = pruned.clone()
            self._mark_least(pruned, start, stop, [
                round(sparsity * (total * (stop - start)))
                for sparsity, total in zip(self.sparsities, self.totals, strict=True)])
        self.grids.append(find_grid(self.W[start:stop].t(), pruned.t(), self.scheme, self.dtype, self.h[start:stop]))

    def _walk(self, start, stop):
        """Walk columns start … stop − 1 one by one."""
        here, grid, groups = slice(start - self.start, stop - self.start), None, None
        if self.chosen_inside:
            groups = self.prunem, list(zip(self.rows, self.prunens, strict=True))
        if self.scheme:
            scale, zero = self.grids[-1]
            grid = scale, -zero, 2**self.scheme.wbits - 1 - zero, self.dtype
        self.walk_columns(self.W[start:stop], self.E[here], self.U[here, here], self.mask[start:stop],
                          self.factors[start:stop], groups, grid)

    def grid(self, rows):
        """Return the Grid of a matrix, columns in the order of the walk."""
        if self.scheme is None:
            return None
        scale, zero = (torch.stack(values, 1)[rows] for values in zip(*self.grids, strict=True))
        group = torch.arange(self.columns, dtype=torch.int32, device=self.W.device) // self.groupsize
        return Grid(self.scheme, scale.to(self.dtype), zero.to(torch.uint8), group)
