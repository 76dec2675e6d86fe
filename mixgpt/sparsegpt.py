"""SparseGPT (arXiv 2301.00774): the algorithm as published, weight saliencies, and the walk that computes it in blocks.

Notation: Y = X Wᵀ with W (out, in); H = (2/N) Xᵀ X (in, in) over N sequences; (H + λI)⁻¹ = Uᵀ U with U upper
triangular, and R = U⁻¹, so that H + λI = R Rᵀ. The first diagonal entry of the inverse Hessian of the columns not yet
processed is U_mm² = 1/R_mm².
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mixgpt.kernels import columns
from mixgpt.kernels.selection import smallest, smallest_in_groups
from mixgpt.quant import Grid, Scheme

WIDE = 512  # So many columns are updated from all columns before them in one product.


@dataclass(frozen=True)
class Target:
    """Target sparsity of one matrix: a fraction of its weights, or prunen of every prunem consecutive ones."""

    sparsity: float
    prunen: int = 0
    prunem: int = 0


def algorithm_1(W: Tensor, H: Tensor, target: Target, saliency: Callable | None = None, blocksize: int = 128,
                percdamp: float = 0.01) -> Tensor:
    """Prune W (out, in) by Algorithm 1 of the paper, to the letter: what `Walk` computes, but faster.

    H: (in, in). Returns the pruned matrix, (out, in). Not used by the program: to read, and to compare with.
    """
    W, (rows, columns), h, saliency = W.clone(), W.shape, H.diagonal(), saliency or obs_saliency
    damped = H + percdamp * h.mean() * torch.eye(columns).to(H)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    mask, width = W == 0, target.prunem or blocksize
    for i in range(columns):
        if i % width == 0:  # The mask of the next block of columns is chosen.
            B = slice(i, min(i + width, columns))
            scores = saliency(W[:, B], h[B], U.diagonal()[B]).masked_fill(h[B] == 0, 0).masked_fill(mask[:, B], -1)
            if target.prunem:
                least = scores.argsort(dim=1, stable=True)[:, :target.prunen]
                mask[:, B] |= torch.zeros_like(mask[:, B]).scatter(1, least, True)
            else:
                count = round(target.sparsity * (rows * B.stop)) - round(target.sparsity * (rows * B.start))
                least = scores.flatten().argsort(stable=True)[:count]
                mask[:, B] |= torch.zeros_like(mask[:, B]).flatten().scatter(0, least, True).view_as(scores)
        q = W[:, i].masked_fill(mask[:, i], 0)
        err = (W[:, i] - q) / U[i, i]
        W[:, i:] -= err[:, None] * U[i, i:]  # The columns that follow compensate the error.
        W[:, i] = q
    return W


class ColumnSaliency:
    """A saliency w² · factor(h, u), with a factor (in,) of the column: the walk computes these without temporaries.

    A saliency is a function score(W, h, u) -> (out, in): it scores the weights W (out, in) of some columns, with the
    diagonals h (in,) of H and u (in,) of U there. Scores are at least 0; the lowest are pruned.
    """

    def __init__(self, factor: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.factor = factor
        self.__doc__ = factor.__doc__

    def __call__(self, W: Tensor, h: Tensor, u: Tensor) -> Tensor:
        return W.square() * self.factor(h, u)


@ColumnSaliency
def obs_saliency(h: Tensor, u: Tensor) -> Tensor:
    """Score weights by the loss increase when they are removed, after compensation.

    SparseGPT (arXiv 2301.00774), eq. 3: w² / [H⁻¹]_mm, and [H⁻¹]_mm = u_m² for the columns not yet processed.
    """
    return (1 / u) ** 2


@ColumnSaliency
def isc_saliency(h: Tensor, u: Tensor) -> Tensor:
    """Score weights by the loss increase when they are removed, before plus after compensation.

    MixGPT (arXiv 2310.09499), eq. 4: w² (H_mm + 1 / [H⁻¹]_mm), with [H⁻¹]_mm = u_m². The released code divides by u_m.
    """
    return h + 1 / u**2


class Walk:
    """One pass over the columns of matrices that read the same input: algorithm 1, and GPTQ (arXiv 2210.17323).

    Kept weights are rounded to a grid that is chosen when the walk reaches its columns. Columns are split into nested
    ranges of decreasing width. On entering a range, one matrix product updates all its columns for the errors of the
    columns before it. The whole range is then up to date, and its mask and grid are chosen.

    For a widest range B, with P the columns before it and D = W − Ŵ there, the update is D_P R_PB R_BB⁻¹: the loss
    tr D (R Rᵀ) Dᵀ = ‖D R‖² is least where (D R)_B = D_P R_PB + D_B R_BB = 0, so only the small R_BB is inverted. Within
    B, U = R_BB⁻¹ is known and the update is −E U as in the paper, with E the errors divided by the diagonal of U.
    """

    def __init__(self, matrices: Sequence[Tensor], R: Tensor, h: Tensor, targets: Sequence[Target], *,
                 blocksize: int = 128, saliency: Callable = obs_saliency, scheme: Scheme | None = None,
                 dtype: torch.dtype = torch.float32, row_weights: Tensor | None = None,
                 totals: Sequence[int] | None = None) -> None:
        """Prepare a walk.

        matrices: (out, in) each, float32 or float64; stacked and walked together. R: (in, in), upper triangular, from
        `hessian.factor`. h: (in,), diagonal of H without damping. targets: one for each matrix, all with the same
        prunem. blocksize: columns whose mask is chosen at once; each block gets an equal share of the sparsity.
        scheme: quantization of the kept weights, if any. dtype: grid values must be exact in it. row_weights: (total
        rows,), factors of the saliencies. totals: rows of each matrix in all processes (default: those given). Groups
        of prunem and of grids must divide all columns, and one of them the other.
        """
        self.W = torch.cat([W.t() for W in matrices], dim=1)  # (in, out)
        self.columns = len(self.W)
        self.D = torch.empty_like(self.W)  # W − Ŵ
        self.mask = self.W == 0  # Zero weights stay zero.
        self.R, self.h, self.u, self.saliency, self.row_weights = R, h, 1 / R.diagonal(), saliency, row_weights
        self.factors = None
        if isinstance(saliency, ColumnSaliency):
            self.factors = saliency.factor(h, self.u).masked_fill(h == 0, 0)
        stops = list(itertools.accumulate(map(len, matrices)))
        self.rows = [slice(stop - len(W), stop) for stop, W in zip(stops, matrices, strict=True)]
        self.totals = totals or list(map(len, matrices))
        self.sparsities, self.prunem = [target.sparsity for target in targets], targets[0].prunem
        self.prunens = torch.cat([torch.full_like(W[:, 0], target.prunen, dtype=torch.int32)
                                  for W, target in zip(matrices, targets, strict=True)])
        self.zeros, self.block = [0] * len(matrices), slice(0, 0)  # The zeros before the last block, and its columns.
        self.given = torch.stack([self.mask[:, rows].sum(1) for rows in self.rows])  # The zeros of each column.
        self.scheme, self.dtype, self.grids = scheme, dtype, []
        self.groupsize = 0 if scheme is None else self.columns if scheme.groupsize == -1 else scheme.groupsize
        # The kernel chooses n:m masks group by group, unless grids are narrower or scores need more than a factor.
        self.chosen_inside = 0 < self.prunem and not 0 < self.groupsize < self.prunem and self.factors is not None
        # Nested ranges have these widths, among them that of a mask and that of a grid.
        m, g = self.prunem or 1, self.groupsize or 1
        block = max(blocksize, m)
        for width in sorted({m, g}):  # A block holds whole groups of both kinds where they fit.
            block = block // width * width or block
        self.mask_width = self.prunem or block  # Columns whose mask is chosen at once.
        wide = max(WIDE // block, 1) * block
        widths = {wide // g * g or wide, block}
        if 0 < self.groupsize < self.columns:  # Else there is one grid, chosen at the start.
            widths.add(g)
        if not self.chosen_inside:
            widths.add(self.mask_width)
        self.widths = sorted(widths, reverse=True)

    def run(self) -> list[tuple[Tensor, Grid | None]]:
        """Walk all columns. Returns (Ŵ (out, in), its quant.Grid or None) for each matrix.

        Prunes round(sparsity · numel) weights of a matrix, spread evenly over column blocks. Weights quantized to zero
        count; the last block's number is an estimate. With prunem > 0, prunes prunen of every prunem consecutive
        weights of a row instead. Zero weights stay zero, even if they exceed the target. In several processes, each has
        some of the rows of every matrix, and numbers are those of all rows. Columns whose input is always zero (h = 0)
        cost nothing to prune: they go first, and are otherwise unchanged.
        """
        if self.groupsize == self.columns:
            self._choose_grid(0, self.columns)
        for width, left, start, stop in _nested(0, self.columns, self.widths):
            if width == self.widths[0]:  # A widest range is updated for the errors of all columns before it.
                first, end, R = start, stop, self.R[start:stop, start:stop]
                U = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
                before = self.W[start:stop].clone()
                if start:
                    self.W[start:stop].addmm_(U.t(), self.R[:start, start:stop].t() @ self.D[:start])
                E = torch.empty_like(before)
            elif start > left:
                done, B = slice(left - first, start - first), slice(start - first, stop - first)
                self.W[start:stop].addmm_(U[done, B].t(), E[done], alpha=-1)
            if width == self.mask_width and not self.chosen_inside:
                self._mark_least(self.mask[start:stop], start, stop)
            if width == self.groupsize < self.columns:
                self._choose_grid(start, stop)
            if width == self.widths[-1]:
                B = slice(start - first, stop - first)
                grid = self.scheme.rounder(*self.grids[-1], self.dtype) if self.scheme else None
                choice = (self.prunem, self.prunens, self.factors[start:stop]) if self.chosen_inside else None
                columns.fastest(self.W, grid)(self.W[start:stop], E[B], U[B, B], self.mask[start:stop], choice, grid)
                if stop == end:
                    self.D[first:stop] = before - self.W[first:stop]
        if self.scheme is None:
            return [(self.W.t()[rows], None) for rows in self.rows]
        W = self.W.t() + 0.0  # This turns −0 of the grid into 0.
        scale, zero = (torch.stack(values, 1) for values in zip(*self.grids, strict=True))
        group = torch.arange(self.columns, dtype=torch.int32, device=W.device) // self.groupsize
        return [(W[rows], Grid(self.scheme, scale[rows].to(self.dtype), zero[rows].to(torch.uint8), group.clone()))
                for rows in self.rows]

    def _share(self, columns: int) -> list[int | Tensor]:
        """Return how many weights of each matrix its sparsity prunes in so many columns."""
        return [round(sparsity * (total * columns))
                for sparsity, total in zip(self.sparsities, self.totals, strict=True)]

    def _counts(self, start: int, stop: int, sums: Tensor) -> list[int | Tensor]:
        """Return how many weights of each matrix to prune in a block of columns; tensors on a GPU, not to wait.

        sums: of each matrix, the zeros in the block before, those of them that were pruned, and those after this block.
        """
        before, self.block = self.block, slice(start, stop)
        # Counts are cumulative, so that the last block meets the total, except for weights that it rounds to zero.
        counts, whole = self._share(stop), self._share(self.columns)
        growth = (stop - start) / max(start - before.start, 1)
        for i, (zeros, removed, later) in enumerate(sums.view(-1, 3)):
            self.zeros[i] = self.zeros[i] + zeros
            # Weights that this block will round to 0 count as pruned but are not known yet: as many are expected per
            # column as in the block before.
            expected = ((zeros - removed).double() * growth).round().long()
            count = (whole[i] - later).clamp(max=counts[i]) - self.zeros[i] - expected
            count = count.clamp(0, self.totals[i] * (stop - start))
            counts[i] = count if self.W.is_cuda else int(count)
        return counts

    def _mark_least(self, mask: Tensor, start: int, stop: int, counts: Sequence[int | Tensor] | None = None) -> None:
        """Mark in `mask` the least salient current weights of each matrix in columns start … stop − 1.

        counts: how many of each matrix (default: as many as the block of columns needs).
        """
        if not (self.prunem or any(self.sparsities)):
            return
        W, B = self.W[start:stop], slice(start, stop)
        if self.factors is not None:
            scores = W.square().mul_(self.factors[B, None])
        else:
            scores = torch.cat([self.saliency(W[:, rows].t(), self.h[B], self.u[B]).t() for rows in self.rows], dim=1)
            scores = scores.masked_fill(self.h[B, None] == 0, 0)
        if self.row_weights is not None:
            scores.mul_(self.row_weights)
        scores.masked_fill_(self.mask[B], -1)
        if self.prunem:
            groups = scores.view(-1, self.prunem, scores.shape[1])
            mask |= smallest_in_groups(groups, self.prunens).view_as(mask)
            return
        matrices = [scores[:, rows].reshape(-1, len(W)) for rows in self.rows]
        if counts:
            marked = smallest(matrices, counts)
        else:
            before, pruned = self.W[self.block], self.mask[self.block]
            marked = smallest(matrices, partial(self._counts, start, stop), torch.stack([
                numbers.sum() for rows, given in zip(self.rows, self.given, strict=True)
                for numbers in (before[:, rows] == 0, pruned[:, rows], given[stop:])]))
        for rows, least in zip(self.rows, marked, strict=True):
            mask[:, rows] |= least.view(len(W), -1)  # In the order in memory, nothing is copied.

    def _choose_grid(self, start: int, stop: int) -> None:
        """Choose the grid of columns start … stop − 1; where their masks are not known yet, these are guessed."""
        pruned, mask_stop = self.mask[start:stop], start // self.mask_width * self.mask_width + self.mask_width
        if self.chosen_inside or self.groupsize == self.columns or stop > mask_stop:
            pruned = pruned.clone()
            self._mark_least(pruned, start, stop, self._share(stop - start))
        self.grids.append(self.scheme.fit(self.W[start:stop].t(), pruned.t(), self.dtype, self.h[start:stop]))


def _nested(left: int, right: int, widths: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (width, left, start, stop) of each range of columns in the order in which a walk enters them.

    Columns left … right − 1 are split into ranges start … stop − 1 of the first width, these into the next, and so on.
    """
    width, *finer = widths
    for start in range(left, right, width):
        stop = min(start + width, right)
        yield width, left, start, stop
        if finer:
            yield from _nested(start, stop, finer)
