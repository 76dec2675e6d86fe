"""Choose the weights to keep by ADMM, then solve for them exactly: a lower layer error than one walk over the columns.

Notation: W (out, in), W* the target weights, H (in, in) positive definite; a row w costs (w − w*) H (w − w*)ᵀ. All
functions here expect columns scaled so that H has a unit diagonal: W √diag(H).
"""

import itertools
from dataclasses import dataclass

import torch

from mixgpt.common import distributed
from mixgpt.kernels.linalg import rough_product_with
from mixgpt.kernels.selection import kth_smallest, smallest, smallest_per_row
from mixgpt.pruning.targets import Target

ITERATIONS = 9  # of ADMM
RAMP = 7  # iterations over which the sparsity rises to its target
STEPS = 3  # of conjugate gradients
SAMPLE = 2**16  # least number of a matrix's scores from which the k-th smallest is estimated


@dataclass(frozen=True)
class Part:
    """One of several stacked matrices."""

    rows: slice  # of the stack
    total: int  # number of its rows in all processes
    target: Target


def keep_mask(scores, parts, fraction=1.0, exact=True, out=None):
    """Mark the weights to keep when the smallest scores of each of several stacked matrices are removed.

    scores: (out, in), 0 where a weight must go. parts: a Part per matrix; round(sparsity · numel) weights go, or prunen
    of every prunem (the same for all matrices) consecutive ones of a row. fraction: multiplies these numbers. exact: if
    False, unstructured counts are only approximate, from a sample of the scores. Returns a mask (out, in) of ones and
    zeros in the dtype of the scores, fast to multiply by; out: memory for it.
    """
    keep = torch.empty_like(scores) if out is None else out
    columns, prunem = scores.shape[1], parts[0].target.prunem
    thresholds, masks = [0.0] * len(parts), [None] * len(parts)
    if prunem:
        masks = [smallest_per_row(scores[part.rows].reshape(-1, prunem), round(fraction * part.target.prunen))
                 .view(-1, columns) for part in parts]
    elif exact:
        masks = smallest([scores[part.rows] for part in parts],
                         [round(fraction * round(part.target.sparsity * (part.total * columns))) for part in parts],
                         [part.total for part in parts])
    else:
        thresholds = _thresholds(scores, parts, fraction)
    for part, threshold, mask in zip(parts, thresholds, masks, strict=True):
        torch.gt(scores[part.rows], threshold, out=keep[part.rows])
        if mask is not None:
            keep[part.rows].masked_fill_(mask, 0)
    return keep


def _thresholds(scores, parts, fraction):
    """Estimate up to which score the weights of each matrix go, from a sample of its scores; see `keep_mask`."""
    columns, processes = scores.shape[1], range(distributed.world())
    steps = [part.total * columns // SAMPLE | 1 for part in parts]  # odd, so that all columns are sampled

    def taken(part, step, number):
        """Return the slice of a matrix's sample that lies in the rows of a process."""
        rows = distributed.share(part.total, number)
        return range(-(-rows.start * columns // step), -(-rows.stop * columns // step))

    samples = []
    for part, step in zip(parts, steps, strict=True):
        first = taken(part, step, distributed.rank()).start * step - distributed.share(part.total).start * columns
        samples.append(scores[part.rows].flatten()[first::step])
    samples = distributed.all_gather_parts(samples, [
        [len(taken(part, step, number)) for part, step in zip(parts, steps, strict=True)] for number in processes])
    return [kth_smallest(sample, max(round(fraction * part.target.sparsity * len(sample)), 1))
            for sample, part in zip(samples, parts, strict=True)]


def admm_scores(W, H, parts, row_weights=None, iterations=ITERATIONS, ramp=RAMP):
    """Score weights (out, in) by the alternating direction method of multipliers; the largest scores are to be kept.

    Returns the scores and, both (out, in), the values that the kept weights have reached.

    W: (out, in), the target weights; zeros go first. parts: as in `keep_mask`. row_weights: (out,), weight of each
    row's error; affects only the ranking, as rows are independent.
    With Z the sparse copy of the weights and V the scaled multipliers, each iteration sets (ρ = 1)
    W ← (H + ρI)⁻¹ (H W* + ρ (Z − V)), Z ← the largest weights of W + V, V ← W + V − Z, while the sparsity rises as
    1 − (1 − t/ramp)³. Boža, arXiv 2401.02938, on normalised columns; ALPS, arXiv 2406.07831.
    """
    regularised = H + torch.eye(len(H), dtype=H.dtype, device=H.device)
    # positive definite: cholesky_ex, so that the host does not wait for a GPU to be told so
    multiply = rough_product_with(torch.cholesky_inverse(torch.linalg.cholesky_ex(regularised).L).mul_(2))
    gone = W == 0
    # scores of 0 are of weights that are gone, those of an expert without tokens are not
    roots = None if row_weights is None else row_weights.clamp(min=torch.finfo(row_weights.dtype).tiny).sqrt()[:, None]
    S = W.clone()  # W + V
    scores, Z = torch.empty_like(S), torch.empty_like(S)
    for t in range(1, iterations + 1):
        torch.abs(S, out=scores)
        if roots is not None:
            scores.mul_(roots)
        scores.masked_fill_(gone, 0)
        if t < iterations:
            keep_mask(scores, parts, 1 - (1 - min(t / ramp, 1)) ** 3, exact=False, out=Z).mul_(S)
            S.add_(W)
            change = multiply(torch.add(Z, S, alpha=-0.5, out=scores))  # as (H + ρI)⁻¹ H = I − ρ (H + ρI)⁻¹
            S.sub_(Z).add_(change)
    return scores, S


def solve_on_support(W, optimum, H, keep, steps=STEPS):
    """Minimize (w − w*) H (w − w*)ᵀ over the kept weights of each row, by conjugate gradients started at W.

    W, optimum (W*): (out, in). keep: mask (out, in). All rows at once; as H has a unit diagonal, plain conjugate
    gradients are already Jacobi-preconditioned. ALPS (arXiv 2406.07831), section 3.3. Returns (out, in).
    """
    keep = keep.to(W.dtype)
    W = W * keep
    residual = ((optimum - W) @ H).mul_(keep)
    direction, square = residual.clone(), _dots(residual, residual)
    for _ in range(steps):
        image = (direction @ H).mul_(keep)
        length = _quotient(square, _dots(direction, image))
        W.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        before, square = square, _dots(residual, residual)
        direction.mul_(_quotient(square, before)).add_(residual)
    return W


def _dots(A, B):
    return torch.linalg.vecdot(A, B)[:, None]


def _quotient(a, b):
    return torch.where(b > 0, a / b, 0)  # a solved row has zero residual


def admm_pruner(matrices, H, targets, row_weights=None):
    """Rank the weights of matrices that read the same input by ADMM; return a function that prunes to given targets.

    matrices: list of (out, in), the target weights; zeros stay zero. H: (in, in), damped; overwritten. targets:
    a Target per matrix. row_weights: (total rows,). The function takes these or similar targets, runs
    `solve_on_support`, and returns a list like `matrices`.
    """
    scale = H.diagonal().sqrt()
    H, W = H.div_(scale).div_(scale[:, None]), torch.cat(matrices) * scale
    counts = [len(matrix) for matrix in matrices]
    stops, totals = list(itertools.accumulate(counts)), distributed.total(counts)

    def stacked(targets):
        return [Part(slice(stop - count, stop), total, target)
                for stop, count, total, target in zip(stops, counts, totals, targets, strict=True)]

    scores, reached = admm_scores(W, H, stacked(targets), row_weights)

    def prune(targets):
        keep = keep_mask(scores, stacked(targets)).bool()
        return (solve_on_support(reached, W, H, keep) / scale).masked_fill_(~keep, 0).split(counts)

    return prune
