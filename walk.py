"""Walk over the columns of matrices: prune, quantize, and let the columns to come compensate (arXiv 2301.00774).

Notation as in `sparsegpt`: W (out, in), H + λI = R Rᵀ with R upper triangular, U = R⁻¹.
"""

import numpy as np
import torch

from quant import Grid, find_grid, to_multiples

INNER = 16  # columns of the innermost range


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


SALIENCIES = {"obs": obs_saliency, "isc": isc_saliency}


def smallest(scores, k):
    """Mark the k smallest scores, exactly k of them also among ties. Returns a mask like `scores`."""
    flat = scores.flatten()
    if flat.device.type == "cpu" and k:  # numpy selects two to three times faster than topk
        mask = flat <= np.partition(flat.numpy(), k - 1)[k - 1].item()
        if mask.count_nonzero() == k:
            return mask.view_as(scores)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(k, largest=False, sorted=False).indices] = True
    return mask.view_as(scores)


def smallest_per_row(scores, n):
    """Mark the n smallest scores of every row. scores: (rows, m). Returns a mask (rows, m)."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(n, dim=1, largest=False, sorted=False).indices, True)


def prune_matrix(W, R, h, *target, **options):
    """Prune and quantize one matrix; see `prune_matrices`. target: sparsity, prunen, prunem. Returns Ŵ and its Grid."""
    return prune_matrices([W], R, h, [target], **options)[0]


def prune_matrices(matrices, R, h, targets, blocksize=128, saliency=obs_saliency, scheme=None, dtype=torch.float32):
    """Prune and quantize matrices that read the same input, and let their remaining columns compensate each error.

    SparseGPT, algorithm 1. matrices: (out, in) each, float32 or float64; walked together, stacked. R: (in, in) from
    `factor`. h: (in,), diagonal of H without damping. targets: (sparsity, prunen, prunem) of each, the latter two 0
    where left out. round(sparsity · numel) weights become 0, spread evenly over blocks of `blocksize` columns; with
    prunem > 0, the same for all, instead prunen weights of every prunem consecutive ones of a row, chosen when the
    walk reaches the group. scheme: a quant.Scheme; every weight that is kept is rounded to a grid found when the walk
    reaches its columns (GPTQ, arXiv 2210.17323). dtype: in which grid values must be exact.
    Returns a list of new matrices (out, in), each with its quant.Grid, None without a scheme.
    Raises ValueError where prunem or the group size does not divide the columns, or neither the other.

    Columns that no input reaches (h = 0) are free to prune: they go first, and keep their weights otherwise.
    """
    walk = _Walk(torch.cat(matrices), R, h, saliency, [len(W) for W in matrices], targets, blocksize, scheme, dtype)
    W = walk.run().t() + 0.0  # −0 of the grid becomes 0
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

    def __init__(self, W, R, h, saliency, rows, targets, blocksize, scheme, dtype):
        self.columns = W.shape[1]
        self.W = W.t().contiguous()  # (in, out) here: a column is contiguous
        self.D = self.W.clone()
        self.mask = torch.zeros_like(self.W, dtype=torch.bool)
        self.R, self.u, self.h, self.saliency = R, 1 / R.diagonal(), h, saliency
        stops = torch.tensor(rows).cumsum(0).tolist()
        self.rows = [slice(stop - count, stop) for stop, count in zip(stops, rows, strict=True)]
        sparsities, prunens, prunems = zip(*((*target, 0, 0)[:3] for target in targets), strict=True)
        self.sparsities, self.prunens, self.prunem = sparsities, prunens, prunems[0]
        self.pruned = [0] * len(rows)
        self.chosen = 0  # columns whose mask is known
        self.scheme, self.dtype = scheme, dtype
        self.groupsize = 0 if scheme is None else self.columns if scheme.groupsize == -1 else scheme.groupsize
        self.grids = []
        self.widths = self._nest(blocksize)

    def _nest(self, blocksize):
        """Return the widths of the ranges, such that those with a mask or a grid of their own are among them."""
        m, g = self.prunem or 1, self.groupsize or 1
        for name, width in {"prunem": m, "groupsize": g}.items():
            if self.columns % width:
                raise ValueError(f"{name} {width} does not divide the {self.columns} columns")
        if m % g and g % m:
            raise ValueError(f"prunem {m}, groupsize {g}: one must divide the other")

        def whole(width):
            """Round a width down to whole groups of both kinds where they fit in."""
            for unit in sorted({m, g}):
                width = width // unit * unit or width
            return width

        self.block = whole(blocksize)
        widths = {m, self.block, whole(min(INNER, self.block))}
        if g < self.columns:  # else the only grid is there from the start
            widths.add(g)
        if 1 not in (self.prunem or self.block, self.groupsize):
            widths.discard(1)  # the columns of the innermost range are walked one by one as it is
        return sorted(widths, reverse=True)

    def run(self):
        """Walk all columns. Returns the new weights, (in, out)."""
        if self.groupsize == self.columns:
            self._choose_grid(0, self.columns)
        top = self.widths[0]
        for start in range(0, self.columns, top):
            B = slice(start, min(start + top, self.columns))
            R = self.R[B, B]
            self.U = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
            if start:
                self.W[B].addmm_(self.U.t(), self.R[:start, B].t() @ self.D[:start])
            self.E, self.start = torch.zeros_like(self.W[B]), start
            self._enter(B.start, B.stop, self.widths)
            self.D[B] -= self.W[B]
        return self.W

    def _enter(self, left, right, widths):
        """Walk columns left … right − 1, which are up to date, in ranges of the first of `widths`."""
        width, *finer = widths
        for start in range(left, right, width):
            stop = min(start + width, right)
            if start > left:
                done, now = slice(left - self.start, start - self.start), slice(start - self.start, stop - self.start)
                self.W[start:stop].addmm_(self.U[done, now].t(), self.E[done], alpha=-1)
            if width == (self.prunem or self.block):
                self._choose_mask(start, stop)
            if width == self.groupsize < self.columns:
                self._choose_grid(start, stop)
            if finer:
                self._enter(start, stop, finer)
            else:
                self._walk(start, stop)

    def _choose_mask(self, start, stop):
        # cumulative counts: the last block meets the total exactly
        counts = [round(sparsity * ((rows.stop - rows.start) * stop))
                  for sparsity, rows in zip(self.sparsities, self.rows, strict=True)]
        self.mask[start:stop] = self._least_salient(
            start, stop, [count - pruned for count, pruned in zip(counts, self.pruned, strict=True)])
        self.chosen, self.pruned = stop, counts

    def _least_salient(self, start, stop, counts):
        h = self.h[start:stop]
        scores = self.saliency(self.W[start:stop].t(), h, self.u[start:stop]).masked_fill(h == 0, 0)
        if self.prunem:
            masks = [smallest_per_row(scores[rows].reshape(-1, self.prunem), n).view(-1, stop - start)
                     for rows, n in zip(self.rows, self.prunens, strict=True)]
        else:
            masks = [smallest(scores[rows], count) for rows, count in zip(self.rows, counts, strict=True)]
        return torch.cat(masks).t()

    def _choose_grid(self, start, stop):
        if stop <= self.chosen:
            pruned = self.mask[start:stop]
        else:  # what would be pruned as things are
            pruned = self._least_salient(start, stop, [
                round(sparsity * ((rows.stop - rows.start) * (stop - start)))
                for sparsity, rows in zip(self.sparsities, self.rows, strict=True)])
        self.grids.append(find_grid(self.W[start:stop].t(), pruned.t(), self.scheme, self.dtype))

    def _walk(self, start, stop):
        """Walk columns start … stop − 1 one by one."""
        here = slice(start - self.start, stop - self.start)
        E, mask = self.E[here], self.mask[start:stop]
        # errors not made yet are 0, so every product takes the whole range
        before, shares = E.t(), self.U[here, here].t().unbind(0)
        columns, errors, u = self.W[start:stop].unbind(0), E.unbind(0), self.u[start:stop]
        if self.scheme is None:
            removed = (mask / u[:, None]).unbind(0)
            for w, e, share, remove in zip(columns, errors, shares, removed, strict=True):
                torch.mul(w.addmv_(before, share, alpha=-1), remove, out=e)
            self.W[start:stop].masked_fill_(mask, 0)
            return
        scale, zero = self.grids[-1]
        low, high = -zero, 2**self.scheme.wbits - 1 - zero
        for w, e, share, m, d in zip(columns, errors, shares, mask.unbind(0), u.unbind(0), strict=True):
            w.addmv_(before, share, alpha=-1)
            q = to_multiples(w, scale, low, high, self.dtype).masked_fill_(m, 0)
            torch.sub(w, q, out=e).div_(d)
            w.copy_(q)

    def grid(self, rows):
        """Return the grids of a matrix, in the order of the walk."""
        if self.scheme is None:
            return None
        scale, zero = (torch.stack(values, 1)[rows] for values in zip(*self.grids, strict=True))
        group = torch.arange(self.columns, dtype=torch.int32, device=self.W.device) // self.groupsize
        return Grid(self.scheme, scale.to(self.dtype), zero.to(torch.uint8), group)
