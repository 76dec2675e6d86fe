"""Prune and quantize matrices from the Hessian of their inputs: SparseGPT's optimal brain surgeon (arXiv 2301.00774).

Notation: Y = X Wᵀ with W (out, in); H = (2/N) Xᵀ X (in, in) over N sequences; U upper triangular with
(H + λI)⁻¹ = Uᵀ U. The inverse Hessian of the columns not yet processed has U_mm² at its first diagonal place.
"""

from dataclasses import replace

import torch

from quant import Grid, find_grid, to_grid

INNER = 16  # columns of the innermost range of the walk
MAX_DAMPING = 1.0  # λ = mean(diag H) bounds the condition number by in + 1: any finite H is factored then


def inverse_factor(H, percdamp=0.01):
    """Factor the damped inverse Hessian: U upper triangular with (H + λI)⁻¹ = Uᵀ U, λ = percdamp · mean(diag H).

    H: (in, in), symmetric. Returns U (in, in) and the percdamp that was needed: where H + λI is not positive
    definite it is raised in steps of 10, from at least 1e-4, up to MAX_DAMPING.
    Raises torch.linalg.LinAlgError where H is not finite or cannot be factored at the limit.

    The flipped Cholesky factor gives H + λI = R Rᵀ with R upper triangular, and U = R⁻¹.
    """
    if not H.diagonal().isfinite().all():
        raise torch.linalg.LinAlgError("the Hessian holds NaN or inf")
    mean = H.diagonal().mean()
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    while True:
        # an input that is zero throughout has no scale of its own: λ = 1 then
        damped = H + torch.where(mean > 0, percdamp * mean, 1.0) * identity
        L, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info == 0:
            return torch.linalg.solve_triangular(L.flip(0, 1), identity, upper=True), percdamp
        if percdamp >= MAX_DAMPING:
            raise torch.linalg.LinAlgError(f"the Hessian is not positive definite at percdamp {percdamp:g}")
        percdamp = min(max(10 * percdamp, 1e-4), MAX_DAMPING)


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
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(k, largest=False, sorted=False).indices] = True
    return mask.view_as(scores)


def smallest_per_row(scores, n):
    """Mark the n smallest scores of every row. scores: (rows, m). Returns a mask (rows, m)."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(n, dim=1, largest=False, sorted=False).indices, True)


def prune_matrix(W, U, h, sparsity, prunen=0, prunem=0, blocksize=128, saliency=obs_saliency, scheme=None,
                 dtype=torch.float32):
    """Prune and quantize W and let the remaining columns compensate each error (SparseGPT, algorithm 1).

    W: (out, in), float32 or float64. U: (in, in) from `inverse_factor`. h: (in,), diagonal of H without damping.
    sparsity: fraction in [0, 1]; round(sparsity · numel) weights become 0, spread evenly over blocks of
    `blocksize` columns. With prunem > 0 instead prunen weights of every prunem consecutive ones of a row become 0,
    chosen when the walk reaches the group. scheme: a quant.Scheme; every weight that is kept is rounded to a grid
    found when the walk reaches its columns (GPTQ, arXiv 2210.17323). dtype: in which grid values must be exact.
    Returns the new matrix (out, in) and its quant.Grid, None without a scheme.
    Raises ValueError where prunem or the group size does not divide the columns, or neither the other.

    Columns that no input reaches (h = 0) are free to prune: they go first, and keep their weights otherwise.
    """
    walk = _Walk(W, U, h, saliency, sparsity, prunen, prunem, blocksize, scheme, dtype)
    walk.run(0, W.shape[1], walk.widths)
    return walk.W.t() + 0.0, walk.grid()  # −0 of the grid becomes 0


class _Walk:
    """One pass over the columns of a matrix.

    Columns lie in nested ranges of decreasing width. On entering a range all its columns receive, in one matrix
    product, the errors of the columns before it in the enclosing range: so a whole range is up to date when its
    first column is reached, and that is when its mask and its grid are chosen.
    """

    def __init__(self, W, U, h, saliency, sparsity, prunen, prunem, blocksize, scheme, dtype):
        self.columns = W.shape[1]
        self.W = W.t().clone(memory_format=torch.contiguous_format)  # (in, out) here: a column is contiguous
        self.E = torch.empty_like(self.W)  # errors over the diagonal of U
        self.mask = torch.zeros_like(self.W, dtype=torch.bool)
        self.U, self.u, self.h, self.saliency = U, U.diagonal(), h, saliency
        self.sparsity, self.prunen, self.prunem = sparsity, prunen, prunem
        self.chosen = self.pruned = 0  # columns whose mask is known, and weights pruned in them
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
        return sorted({m, g, self.block, whole(min(INNER, self.block)), 1}, reverse=True)

    def run(self, left, right, widths):
        """Walk columns left … right − 1, which are up to date, in ranges of the first of `widths`."""
        width, *finer = widths
        for start in range(left, right, width):
            stop = min(start + width, right)
            if start > left:
                self.W[start:stop].addmm_(self.U[left:start, start:stop].t(), self.E[left:start], alpha=-1)
            if width == (self.prunem or self.block):
                self._choose_mask(start, stop)
            if width == self.groupsize:
                self._choose_grid(start, stop)
            if finer:
                self.run(start, stop, finer)
            else:
                self._step(start)

    def _choose_mask(self, start, stop):
        target = round(self.sparsity * (self.W.shape[1] * stop))  # cumulative: the last block meets the total exactly
        self.mask[start:stop] = self._least_salient(start, stop, target - self.pruned)
        self.chosen, self.pruned = stop, target

    def _least_salient(self, start, stop, count):
        h = self.h[start:stop]
        scores = self.saliency(self.W[start:stop].t(), h, self.u[start:stop]).masked_fill(h == 0, 0)
        if self.prunem:
            return smallest_per_row(scores.reshape(-1, self.prunem), self.prunen).view(scores.shape).t()
        return smallest(scores, count).t()

    def _choose_grid(self, start, stop):
        W = self.W[start:stop].t()
        known = stop <= self.chosen  # else what would be pruned as things are
        pruned = self.mask[start:stop].t() if known else self._least_salient(
            start, stop, round(self.sparsity * W.numel())).t()
        self.grids.append(find_grid(W, pruned, self.scheme, self.dtype))

    def _step(self, j):
        w = self.W[j]
        if self.scheme:
            scale, zero = self.grids[-1]
            q = to_grid(w, scale, zero, self.scheme.wbits, self.dtype).masked_fill_(self.mask[j], 0)
        else:
            q = w.masked_fill(self.mask[j], 0)
        torch.sub(w, q, out=self.E[j]).div_(self.u[j])
        self.W[j] = q

    def grid(self):
        """Return the grids of all columns, in the order of the walk."""
        if self.scheme is None:
            return None
        scale, zero = (torch.stack(values, 1) for values in zip(*self.grids, strict=True))
        group = torch.arange(self.columns, dtype=torch.int32, device=self.W.device) // self.groupsize
        return Grid(self.scheme, scale.to(self.dtype), zero.to(torch.uint8), group)


def magnitude_prune(W, sparsity, prunen=0, prunem=0):
    """Set the weights of smallest magnitude to 0 and leave the others as they are.

    W: (out, in). sparsity, prunen, prunem: as in `prune_matrix`. Returns a new tensor (out, in).
    """
    scores = W.abs().float()
    if prunem:
        mask = smallest_per_row(scores.reshape(-1, prunem), prunen).view(W.shape)
    else:
        mask = smallest(scores, round(sparsity * W.numel()))
    return W.masked_fill(mask, 0)


def relative_error(W, W_hat, H):
    """Return ‖(W − Ŵ) X‖² / ‖W X‖² over the calibration inputs behind H (0 where W X vanishes).

    W, W_hat: (out, in). H: (in, in), undamped; its scale cancels.
    """
    def energy(A):
        return ((A @ H) * A).sum().item()

    output = energy(W)
    return max(energy(W - W_hat), 0.0) / output if output else 0.0


class SparseGPT:
    """Collect the Hessian of one distinct input and prune every matrix that reads it."""

    def __init__(self, columns, nsequences, device):
        """Start from H = 0. columns: width of the input. nsequences: N of H = (2/N) Xᵀ X."""
        self.H = torch.zeros(columns, columns, device=device)
        self.scale = 2 / nsequences

    def add_batch(self, X):
        """Add inputs X (..., in) to the Hessian, in float32."""
        X = X.reshape(-1, X.shape[-1]).float()
        self.H.addmm_(X.t(), X, alpha=self.scale)

    def factor(self, percdamp, order=None):
        """Factor the Hessian once for all matrices; see `inverse_factor`. Returns the percdamp that was needed.

        order: (in,), the columns in the order in which to walk them (default: as they are).
        """
        self.order = slice(None) if order is None else order
        self.back = slice(None) if order is None else order.argsort()
        self.U, used = inverse_factor(self.H[self.order][:, self.order], percdamp)
        return used

    def prune(self, weight, *target, **options):
        """Prune and quantize `weight` (out, in) in place, in its own dtype.

        target: sparsity, prunen and prunem, and options: the others, of `prune_matrix`. Returns the matrix's
        `relative_error` and quant.Grid, None where it is not quantized.
        """
        W, h = weight.float(), self.H.diagonal()[self.order]
        W_hat, grid = prune_matrix(W[:, self.order], self.U, h, *target, dtype=weight.dtype, **options)
        W_hat = W_hat[:, self.back].to(weight.dtype)
        error = relative_error(W, W_hat.float(), self.H)  # before the copy: W may be the weight itself
        weight.copy_(W_hat)
        return error, grid and replace(grid, group=grid.group[self.back])


def activation_order(h, prunem=0):
    """Return the columns in order of decreasing h (in,), the diagonal of H; n:m groups stay whole, by their sum."""
    groups = h.view(-1, prunem or 1)
    order = groups.sum(1).argsort(descending=True, stable=True)
    return torch.arange(len(h), device=h.device).view(groups.shape)[order].flatten()
