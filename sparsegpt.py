"""The Hessian of an input, and the matrices pruned by it: SparseGPT's optimal brain surgeon (arXiv 2301.00774).

Notation: Y = X Wᵀ with W (out, in); H = (2/N) Xᵀ X (in, in) over N sequences; H + λI = R Rᵀ with R upper triangular,
and U = R⁻¹, so that (H + λI)⁻¹ = Uᵀ U. The inverse Hessian of the columns not yet processed has U_mm² = 1/R_mm² at its
first diagonal place.
"""

from dataclasses import replace

import torch

import distributed
from columns import smallest_per_row
from walk import prune_matrices, smallest

MAX_DAMPING = 1.0  # λ = mean(diag H) bounds the condition number by in + 1: any finite H is factored then


def factor(H, percdamp=0.01):
    """Factor the damped Hessian: R upper triangular with H + λI = R Rᵀ, λ = percdamp · mean(diag H).

    H: (in, in), symmetric; its upper triangle is read. Returns R (in, in) and the percdamp that was needed: where
    H + λI is not positive definite it is raised in steps of 10, from at least 1e-4, up to MAX_DAMPING.
    Raises torch.linalg.LinAlgError where H is not finite or cannot be factored at the limit.
    """
    if not H.diagonal().isfinite().all():
        raise torch.linalg.LinAlgError("the Hessian holds NaN or inf")
    mean = H.diagonal().mean()
    while True:
        damped = H.flip(0, 1)  # the Cholesky factor of the flipped matrix, flipped back, is upper triangular
        # an input that is zero throughout has no scale of its own: λ = 1 then
        damped.diagonal().add_(torch.where(mean > 0, percdamp * mean, 1.0))
        L, info = torch.linalg.cholesky_ex(damped)
        del damped  # one of these may take a tenth of what a run needs
        if info == 0:
            return L.flip(0, 1), percdamp
        if percdamp >= MAX_DAMPING:
            raise torch.linalg.LinAlgError(f"the Hessian is not positive definite at percdamp {percdamp:g}")
        percdamp = min(max(10 * percdamp, 1e-4), MAX_DAMPING)


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
    """Return the diagonal of A H Aᵀ, ‖a X‖² for every row a of A (rows, in): from the upper blocks of H (in, in)."""
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
        self._H = torch.zeros(columns, columns, device=device)
        self._mirrored = True
        self.scale = 2 / nsequences
        self.sums = []  # of each batch, (B,): sums of the inputs of a sequence, by who adds them

    def add_batch(self, X):
        """Add inputs X (..., in) to the blocks on and above the diagonal of H: exact products, float32 sums."""
        X = X.reshape(-1, X.shape[-1])
        halves = X.is_cuda and X.dtype in (torch.bfloat16, torch.float16)  # no such product on a CPU
        X = X if halves else X.float()
        for B in upper_blocks(X.shape[1]):
            H, before = self._H[:B.stop, B], X[:, :B.stop].t()
            if halves:
                H.add_(torch.mm(before, X[:, B], out_dtype=torch.float32), alpha=self.scale)
            else:
                H.addmm_(before, X[:, B], alpha=self.scale)
        self._mirrored = False

    def reduce(self):
        """Sum the Hessian over all processes."""
        distributed.add(self._H)

    @property
    def H(self):
        """The Hessian (in, in)."""
        if not self._mirrored:
            self._H.triu_()
            self._H += self._H.triu(1).t()
            self._mirrored = True
        return self._H

    def factor(self, percdamp, order=None):
        """Factor the Hessian once for all matrices; see `factor`. Returns the percdamp that was needed.

        order: (in,), the columns in the order in which to walk them (default: as they are).
        """
        self.order = slice(None) if order is None else order
        self.back = slice(None) if order is None else order.argsort()
        self.R, used = factor(self.H[self.order][:, self.order], percdamp)
        return used

    def prune(self, weights, targets, **options):
        """Prune and quantize `weights`, a list of matrices (out, in) of one dtype, in place.

        targets and options: as in `prune_matrices`. Returns the `relative_error` and the quant.Grid of each, None
        where it is not quantized.
        """
        h, dtype, counts = self.H.diagonal()[self.order], weights[0].dtype, [len(weight) for weight in weights]
        W = torch.cat([weight.float() for weight in weights])
        pruned = prune_matrices(W[:, self.order].split(counts), self.R, h, targets, dtype=dtype, **options)
        W_hat = torch.cat([matrix for matrix, _ in pruned])[:, self.back].to(dtype)
        whole, lost = row_energies(W, self.H).split(counts), row_energies(W - W_hat.float(), self.H).split(counts)
        for weight, new in zip(weights, W_hat.split(counts), strict=True):
            weight.copy_(new)
        return [(_ratio(lost, whole), grid and replace(grid, group=grid.group[self.back]))
                for lost, whole, (_, grid) in zip(lost, whole, pruned, strict=True)]


def activation_order(h, prunem=0):
    """Return the columns in order of decreasing h (in,), the diagonal of H; n:m groups stay whole, by their sum."""
    groups = h.view(-1, prunem or 1)
    order = groups.sum(1).argsort(descending=True, stable=True)
    return torch.arange(len(h), device=h.device).view(groups.shape)[order].flatten()
