"""The Hessian of an input, and the matrices pruned by it: SparseGPT's optimal brain surgeon (arXiv 2301.00774).

Notation: Y = X Wᵀ with W (out, in); H = (2/N) Xᵀ X (in, in) over N sequences; H + λI = R Rᵀ with R upper triangular,
and U = R⁻¹, so that (H + λI)⁻¹ = Uᵀ U. The inverse Hessian of the columns not yet processed has U_mm² = 1/R_mm² at its
first diagonal place.
"""

from dataclasses import replace
from functools import cached_property

import torch

from mixgpt.common import distributed
from mixgpt.kernels.columns import smallest_per_row
from mixgpt.kernels.matmul import exact_bfloat16, suits, times_transposed
from quant import meet_sparsities
from solver import admm_pruner
from walk import prune_matrices, smallest, upper_inverse

MAX_DAMPING = 1.0  # λ = mean(diag H) bounds the condition number by in + 1: any finite H is factored then
PANEL = 512  # columns that are factored at a time


def factor(H, percdamp=0.01):
    """Factor the damped Hessian: R upper triangular with H + λI = R Rᵀ, λ = percdamp · mean(diag H).

    H: (in, in), symmetric; its upper triangle is read. Returns R (in, in) and the percdamp that was needed: where
    H + λI is not positive definite it is raised in steps of 10, from at least 1e-4, up to MAX_DAMPING.
    Raises torch.linalg.LinAlgError where H is not finite or cannot be factored at the limit.
    """
    if not H.diagonal().isfinite().all():
        raise torch.linalg.LinAlgError("the Hessian holds NaN or inf")
    while True:
        R = upper_cholesky(H, damping(H, percdamp))
        if R is not None:
            return R, percdamp
        if percdamp >= MAX_DAMPING:
            raise torch.linalg.LinAlgError(f"the Hessian is not positive definite at percdamp {percdamp:g}")
        percdamp = min(max(10 * percdamp, 1e-4), MAX_DAMPING)


def damping(H, percdamp):
    """Return λ = percdamp · mean(diag H)."""
    mean = H.diagonal().mean()
    return torch.where(mean > 0, percdamp * mean, 1.0)  # an input that is zero throughout has no scale of its own


def upper_cholesky(H, damping):
    """Return R (in, in), upper triangular with H + damping · I = R Rᵀ, None where that is not positive definite.

    H: (in, in), symmetric; its upper triangle is read.
    """
    if not suits(H) or len(H) <= 3 * PANEL:
        damped = H.flip(0, 1)  # the Cholesky factor of the flipped matrix, flipped back, is upper triangular
        damped.diagonal().add_(damping)
        L, info = torch.linalg.cholesky_ex(damped)
        return L.flip(0, 1) if info == 0 else None
    # the same from the last panel of columns to the first, by products; MKL's factorisation knows no faster ones
    R, panels = torch.zeros_like(H), []
    for stop in range(len(H), 0, -PANEL):
        B = slice(max(stop - PANEL, 0), stop)
        rest = H[:stop, B].contiguous()
        for panel in panels:
            rest = times_transposed(panel[:stop], -panel[B], rest)
        R_B = upper_cholesky(rest[B], damping)
        if R_B is None:
            return None
        R[B, B] = R_B
        if B.start:
            above = times_transposed(rest[:B.start], upper_inverse(R_B))
            R[:B.start, B] = above
            panels.append(above)
    return R


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


def upper_blocks(columns):
    """Return the ranges of columns by which symmetric products are made; each needs only the rows up to its end."""
    width = max(192, columns // 8)  # narrower saves little more and multiplies slower
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def row_energies(A, H):
    """Return the diagonal of A H Aᵀ, ‖a X‖² for every row a of A (rows, in). H: (in, in), symmetric."""
    if suits(A, H):  # copying blocks of A would cost more than the lower half
        return torch.linalg.vecdot(times_transposed(A, H), A)
    total = torch.zeros(len(A), dtype=A.dtype, device=A.device)
    for B in upper_blocks(A.shape[1]):
        A_B = A[:, B]
        AH = A_B @ H[B, B]
        if B.start:
            AH.addmm_(A[:, :B.start], H[:B.start, B], alpha=2)  # what lies above the diagonal counts for both sides
        total += torch.linalg.vecdot(AH, A_B)
    return total


def relative_error(W, W_hat, H):
    """Return ‖(W − Ŵ) X‖² / ‖W X‖² over the calibration inputs behind H (0 where W X vanishes).

    W, W_hat: (out, in). H: (in, in), undamped; its scale cancels.
    """
    return _ratio(row_energies(W - W_hat, H), row_energies(W, H))


def _ratio(lost, whole):
    whole = whole.sum().item()
    return max(lost.sum().item(), 0.0) / whole if whole else 0.0


class SparseGPT:
    """Collect the Hessian of one distinct input and prune every matrix that reads it."""

    def __init__(self, columns, nsequences, device):
        """Start from H = 0. columns: width of the input. nsequences: N of H = (2/N) Xᵀ X."""
        self._blocks = upper_blocks(columns)
        # the upper triangle by blocks of columns, each down to its diagonal, without the factor 2/N
        self._sums = [torch.zeros(B.stop, B.stop - B.start, device=device) for B in self._blocks]
        self._scale = 2 / nsequences
        self._shift = self._gain = None
        self.sums = []  # of each batch, (B,): sums of the inputs of a sequence, by who adds them

    def add_batch(self, X, shift=None, gain=None, weights=None):
        """Add inputs X (..., in) to the blocks on and above the diagonal of H: exact products, float32 sums.

        What the outputs shall come close to, where it is not X Wᵀ: with shift (..., in), (X + shift) Wᵀ; with gain
        (..., out), X Wᵀ + gain. weights (tokens,): how often each token counts (default: once).
        """
        X = X.reshape(-1, X.shape[-1])
        equal = weights is None
        direct = X.is_cuda and X.dtype in (torch.bfloat16, torch.float16) and equal  # no such product on a CPU
        roots = None if equal else weights.sqrt()
        features = None if direct and shift is gain is None else _features(X, roots)
        if shift is not None:
            self._shift = times_transposed(_features(shift, roots), features, self._shift)
        if gain is not None:
            self._gain = times_transposed(_features(gain, roots), features, self._gain)
        if direct:
            for B, total in zip(self._blocks, self._sums, strict=True):
                total.add_(torch.mm(X[:, :B.stop].t(), X[:, B], out_dtype=torch.float32))
            return
        with exact_bfloat16(X.dtype if equal else None):
            self._sums = [times_transposed(features[:B.stop], features[B], total)
                          for B, total in zip(self._blocks, self._sums, strict=True)]

    def reduce(self):
        """Sum the Hessian over all processes."""
        for total in (*self._sums, self._shift, self._gain):
            if total is not None:
                distributed.add(total)

    @cached_property
    def H(self):
        """The Hessian (in, in), complete: no batch is added after this was asked for."""
        H = torch.empty(self._blocks[-1].stop, self._blocks[-1].stop, device=self._sums[0].device)
        for B in self._blocks:
            block = self._sums.pop(0).mul_(self._scale)
            H[:B.stop, B] = block
            H[B, :B.start] = block[:B.start].t()
            H[B, B] = block[B].triu() + block[B].triu(1).t()
        return H

    def factor(self, percdamp, order=None):
        """Factor the Hessian once for all matrices; see `factor`. Returns the percdamp that was needed.

        order: (in,), the columns in the order in which to walk them (default: as they are).
        """
        self.order = slice(None) if order is None else order
        self.back = slice(None) if order is None else order.argsort()
        self.R, self.percdamp = factor(self.H[self.order][:, self.order], percdamp)
        return self.percdamp

    def wanted(self, W):
        """Return the weights W* (out, in), columns in the order of the walk, that the pruned ones shall come close to.

        W: (out, in), those of the dense model, which are W* where no batch had a shift s or a gain g. Else, with
        D = (2/N) Σ s ẋᵀ and G = (2/N) Σ g ẋᵀ over the inputs ẋ, W* = W + (W D + G) (H + λI)⁻¹ solves the least squares
        problem for the outputs W (ẋ + s) + g with a ridge of λ around W. Around W*, the loss of any other weights is
        the same quadratic as around W before. Weights that are 0 stay 0. Compare QEP (arXiv 2504.09629).
        """
        W, moment = W[:, self.order], 0.0
        if self._shift is None and self._gain is None:
            return W
        if self._shift is not None:
            moment = times_transposed(W, self._shift[self.order][:, self.order].t())
        if self._gain is not None:
            moment = moment + self._gain[:, self.order]
        moved = torch.linalg.solve_triangular(self.R.t(), self._scale * moment, upper=False, left=False)
        moved = torch.linalg.solve_triangular(self.R, moved, upper=True, left=False)
        return (W + moved).masked_fill_(W == 0, 0)

    def prune(self, weights, targets, solver="obs", row_weights=None, scheme=None, **options):
        """Prune and quantize `weights`, a list of matrices (out, in) of one dtype, in place.

        targets, row_weights and options: as in `prune_matrices`. solver: obs, by one walk; admm, by `admm_pruner`, and
        the walk only quantizes. Returns the `relative_error` and the quant.Grid of each, None where it is not
        quantized.
        """
        h, dtype, counts = self.H.diagonal()[self.order], weights[0].dtype, [len(weight) for weight in weights]
        W = torch.cat([weight.float() for weight in weights])
        wanted = self.wanted(W).split(counts)

        def walk(matrices, targets):
            return prune_matrices(matrices, self.R, h, targets, dtype=dtype, row_weights=row_weights, scheme=scheme,
                                  **options)

        if solver == "obs":
            pruned = walk(wanted, targets)
        else:
            H = self.H[self.order][:, self.order].clone()
            H.diagonal().add_(damping(H, self.percdamp))
            prune = admm_pruner(wanted, H, targets, row_weights)
            if scheme is None:
                pruned = [(matrix, None) for matrix in prune(targets)]
            else:
                pruned = meet_sparsities(
                    lambda asked: walk(prune([(sparsity, *groups) for sparsity, (_, *groups)
                                              in zip(asked, targets, strict=True)]), [(0.0,)] * len(targets)),
                    [sparsity for sparsity, *_ in targets], attempts=1 if any(targets[0][1:]) else 4)
        W_hat = torch.cat([matrix for matrix, _ in pruned])[:, self.back].to(dtype)
        whole, lost = row_energies(W, self.H).split(counts), row_energies(W - W_hat.float(), self.H).split(counts)
        for weight, new in zip(weights, W_hat.split(counts), strict=True):
            weight.copy_(new)
        return [(_ratio(lost, whole), grid and replace(grid, group=grid.group[self.back]))
                for lost, whole, (_, grid) in zip(lost, whole, pruned, strict=True)]


def _features(X, factors=None):
    """Return X (..., width), times factors (tokens,), as floats by features, (width, tokens)."""
    features = X.reshape(-1, X.shape[-1]).t().contiguous().float()  # a transposed copy of floats takes longer
    return features if factors is None else features * factors


def activation_order(h, prunem=0):
    """Return the columns in order of decreasing h (in,), the diagonal of H; n:m groups stay whole, by their sum."""
    groups = h.view(-1, prunem or 1)
    order = groups.sum(1).argsort(descending=True, stable=True)
    return torch.arange(len(h), device=h.device).view(groups.shape)[order].flatten()
