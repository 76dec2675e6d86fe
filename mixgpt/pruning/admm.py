"""Choose the weights to keep by ADMM, then fit them by conjugate gradients: a lower layer error than by one walk.

Notation: W (out, in), W* the optimum, H (in, in) positive definite; a row w costs (w − w*) H (w − w*)ᵀ. All functions
here but `admm_pruner` expect columns scaled so that H has a unit diagonal: W √diag(H).
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import vecdot

from mixgpt.common import distributed
from mixgpt.common.runtime import multiplies_bfloat16
from mixgpt.kernels.selection import kth_smallest, smallest, smallest_in_groups
from mixgpt.pruning.targets import Target

ITERATIONS = 9  # ADMM takes so many iterations.
RAMP = 7  # The sparsity rises to its target over so many of them.
STEPS = 3  # Conjugate gradients take so many steps from where ADMM ends,
FROM_OPTIMUM = 12  # and from the optimum, for given masks.
FAINT = 1e-12  # Columns without input are scaled by it.
SAMPLE = 2**16  # The k-th smallest of a matrix's scores is estimated from at least so many.


def prune_masks(scores: Sequence[Tensor], targets: Sequence[Target], totals: Sequence[int],
                fraction: float | None = None) -> list[Tensor]:
    """Mark the weights to prune, those of the smallest scores of each of several matrices.

    scores: matrices (out, in), this process's share of the `totals` rows, below 0 where a weight must go. targets:
    round(sparsity · numel) weights of a matrix go, or prunen of every prunem (the same for all) consecutive ones of a
    row. fraction: multiplies these numbers; without n:m they are then approximate, from a sample of the scores.
    """
    columns, prunem = scores[0].shape[1], targets[0].prunem
    if fraction is not None and not prunem:
        samples, sizes = [], []
        for part, total in zip(scores, totals, strict=True):  # The sample is the same in any number of processes.
            step = total * columns // SAMPLE | 1  # An even step would take few columns only.
            first, *starts = [distributed.share(total, rank).start * columns
                              for rank in (distributed.rank(), *range(distributed.world() + 1))]
            samples.append(part.flatten()[-first % step::step])
            sizes.append([-(-end // step) - -(-start // step) for start, end in itertools.pairwise(starts)])
        samples = distributed.all_gather_parts(samples, list(zip(*sizes, strict=True)))
        return [part <= kth_smallest(sample, max(round(fraction * target.sparsity * len(sample)), 1))
                for part, sample, target in zip(scores, samples, targets, strict=True)]
    if prunem:
        share = 1 if fraction is None else fraction
        masks = [smallest_in_groups(part.reshape(-1, prunem, 1), round(share * target.prunen)).view(-1, columns)
                 for part, target in zip(scores, targets, strict=True)]
    else:
        masks = smallest(scores, [round(target.sparsity * (total * columns))
                                  for target, total in zip(targets, totals, strict=True)])
    return [mask | (part < 0) for mask, part in zip(masks, scores, strict=True)]


def admm_scores(W: Tensor, H: Tensor, counts: list[int], targets: Sequence[Target],
                row_weights: Tensor | None = None, totals: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Score weights by the alternating direction method of multipliers; the largest scores are to be kept.

    W: (out, in), the optima of stacked matrices, which have `counts` rows; zeros go first. row_weights: (out,), above
    0; they affect only the ranking, as rows are independent. totals: `counts` in all processes, if there are several.
    Also returns the values that weights have reached.
    With Z the sparse copy of the weights and V the scaled multipliers, each iteration sets (ρ = 1)
    W ← (H + ρI)⁻¹ (H W* + ρ (Z − V)), Z ← the largest weights of W + V, V ← W + V − Z, while the sparsity rises as
    1 − (1 − t/RAMP)³. Boža, arXiv 2401.02938, on normalised columns; ALPS, arXiv 2406.07831.
    """
    regularised = H + torch.eye(len(H), dtype=H.dtype, device=H.device)
    # It is positive definite; cholesky_ex does not make the host wait for a GPU to confirm that.
    multiply = rough_product_with(torch.cholesky_inverse(torch.linalg.cholesky_ex(regularised).L).mul_(2))
    gone = W == 0
    roots = 1 if row_weights is None else row_weights.sqrt()[:, None]
    S = W.clone()  # W + V
    scores, Z = torch.empty_like(S), torch.empty_like(S)
    for t in range(1, ITERATIONS + 1):
        torch.abs(S, out=scores).mul_(roots).masked_fill_(gone, -1)
        if t < ITERATIONS:
            masks = prune_masks(scores.split(counts), targets, totals or counts, 1 - (1 - min(t / RAMP, 1)) ** 3)
            torch.logical_not(torch.cat(masks), out=Z).mul_(S)  # On a CPU, masked_fill takes many times as long.
            S.add_(W)
            change = multiply(torch.add(Z, S, alpha=-0.5, out=scores))  # (H + ρI)⁻¹ H = I − ρ (H + ρI)⁻¹
            S.sub_(Z).add_(change)
    return scores, S


def solve_on_support(W: Tensor, optimum: Tensor, H: Tensor, keep: Tensor, steps: int) -> Tensor:
    """Minimize (w − w*) H (w − w*)ᵀ over the kept weights of each row, by conjugate gradients started at W.

    All are (out, in). As H has a unit diagonal, this is Jacobi-preconditioned: ALPS (arXiv 2406.07831), section 3.3.
    """
    keep = keep.to(W.dtype)
    W = W * keep
    residual = ((optimum - W) @ H).mul_(keep)
    direction, square = residual.clone(), vecdot(residual, residual)
    for _ in range(steps):
        image = (direction @ H).mul_(keep)
        length = _quotient(square, vecdot(direction, image))
        W.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        before, square = square, vecdot(residual, residual)
        direction.mul_(_quotient(square, before)).add_(residual)
    return W


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0)[:, None]  # A solved row has zero residual.


def admm_pruner(matrices: list[Tensor], H: Tensor, targets: Sequence[Target], row_weights: Tensor | None = None,
                dead: Tensor | None = None, totals: Sequence[int] | None = None,
                masks: Sequence[Tensor] | None = None) -> Callable[[Sequence[Target]], Sequence[Tensor]]:
    """Rank the weights of matrices that read the same input by ADMM; return a function that prunes to given targets.

    matrices: their optima (out, in); zeros stay zero. H: (in, in), damped; overwritten. row_weights: (total rows,).
    dead: (in,), marks columns without input, whose weights go first. totals: rows of each matrix in all processes.
    masks: (out, in) of each matrix, mark the weights to prune if they are given; ADMM is then left out.
    """
    scale = H.diagonal().sqrt()
    H = H.div_(scale).div_(scale[:, None])
    scale = scale if dead is None else scale * torch.where(dead, FAINT, 1.0)
    W = torch.cat(matrices) * scale
    counts = [len(matrix) for matrix in matrices]
    if masks:
        scores, reached, steps = 1.0 - 2.0 * torch.cat(list(masks)), W, FROM_OPTIMUM
    else:
        (scores, reached), steps = admm_scores(W, H, counts, targets, row_weights, totals), STEPS

    def prune(targets: Sequence[Target]) -> Sequence[Tensor]:
        pruned = torch.cat(prune_masks(scores.split(counts), targets, totals or counts))
        return (solve_on_support(reached, W, H, ~pruned, steps) / scale).masked_fill_(pruned, 0).split(counts)

    return prune


def rough_product_with(B: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function A (m, k) ↦ A B, B (k, n), good to about three digits: in bfloat16 where that is fast."""
    if B.dtype != torch.float32 or not multiplies_bfloat16(B.device):
        return lambda A: A @ B
    B = B.bfloat16()
    return lambda A: A.bfloat16() @ B
