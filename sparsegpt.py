"""Prune matrices from the Hessian of their inputs: SparseGPT's optimal brain surgeon (arXiv 2301.00774).

Notation: Y = X Wᵀ with W (out, in); H = (2/N) Xᵀ X (in, in) over N sequences; U upper triangular with
(H + λI)⁻¹ = Uᵀ U. The inverse Hessian of the columns not yet processed has U_mm² at its first diagonal place.
"""

import torch

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


def prune_matrix(W, U, h, sparsity, prunen=0, prunem=0, blocksize=128, saliency=obs_saliency):
    """Prune W and let the remaining columns compensate each removed weight (SparseGPT, algorithm 1).

    W: (out, in), float32 or float64. U: (in, in) from `inverse_factor`. h: (in,), diagonal of H without damping.
    sparsity: fraction in [0, 1]; round(sparsity · numel) weights become 0, spread evenly over blocks of
    `blocksize` columns. With prunem > 0 instead prunen weights of every prunem consecutive ones of a row become 0,
    chosen when the walk reaches the group. Returns the pruned matrix (out, in), a new tensor.
    Raises ValueError where prunem does not divide the columns.

    Columns that no input reaches (h = 0) are free to prune: they go first, and keep their weights otherwise.
    """
    rows, columns = W.shape
    if prunem and columns % prunem:
        raise ValueError(f"prunem {prunem} does not divide the {columns} columns")
    W = W.t().clone(memory_format=torch.contiguous_format).t()  # contiguous columns: the walk goes column by column
    u = U.diagonal()
    if prunem:  # whole groups in a block; the choice of the mask does not depend on the block
        blocksize = max(blocksize // prunem, 1) * prunem
    pruned = 0
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        E = torch.zeros(rows, stop - start, dtype=W.dtype, device=W.device)
        for left in range(start, stop, prunem or blocksize):
            right = min(left + (prunem or blocksize), stop)
            group = slice(left, right)
            scores = saliency(W[:, group], h[group], u[group]).masked_fill(h[group] == 0, 0)
            if prunem:
                mask = smallest_per_row(scores, prunen)
            else:
                target = round(sparsity * (rows * right))  # cumulative: the last block meets the total exactly
                mask, pruned = smallest(scores, target - pruned), target
            for j in range(left, right):
                e = W[:, j] * mask[:, j - left] / u[j]
                W[:, j:stop].addr_(e, U[j, j:stop], alpha=-1)
                W[:, j].masked_fill_(mask[:, j - left], 0)
                E[:, j - start] = e
        W[:, stop:] -= E @ U[start:stop, stop:]
    return W.contiguous()


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

    def factor(self, percdamp):
        """Factor the Hessian once for all matrices; see `inverse_factor`. Returns the percdamp that was needed."""
        self.U, used = inverse_factor(self.H, percdamp)
        return used

    def prune(self, weight, sparsity, prunen=0, prunem=0, blocksize=128, saliency=obs_saliency):
        """Prune `weight` (out, in) in place in its own dtype and return its `relative_error`."""
        W = weight.float()
        h = self.H.diagonal()
        W_hat = prune_matrix(W, self.U, h, sparsity, prunen, prunem, blocksize, saliency).to(weight.dtype)
        error = relative_error(W, W_hat.float(), self.H)  # before the copy: W may be the weight itself
        weight.copy_(W_hat)
        return error
