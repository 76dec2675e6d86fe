"""Solvers, which prune and quantize the matrices that read one input, and the recipe that selects one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mixgpt.common import distributed
from mixgpt.pruning.admm import admm_pruner, prune_masks
from mixgpt.pruning.hessian import InputHessian
from mixgpt.pruning.targets import Target
from mixgpt.quant import Scheme, meet_sparsities, quantize_nearest
from mixgpt.sparsegpt import Walk, obs_saliency

MARGIN_SIGMAS = 3  # of `meet_sparsities`, so that the walk rounds too few weights to 0, not too many


@dataclass(frozen=True)
class Problem:
    """Input of a solver: the matrices that read one input, of each this process's share of the rows, and their targets.

    Columns are in the order of the walk. A solver returns [(Ŵ, its quant.Grid or None)] in the order of `optima`;
    zeros of W* must be zeros of Ŵ.
    """

    hessian: InputHessian  # factored
    optima: list[torch.Tensor]  # W* (out, in) of each, float32: the unconstrained optimum
    targets: list[Target]  # of each
    recipe: "Recipe"
    dtype: torch.dtype  # of the final weights
    row_weights: torch.Tensor | None = None  # (total rows,), weight of each row's error


def walk(problem):
    """Walk once over the columns: SparseGPT, and GPTQ if there is a scheme."""
    recipe, targets = problem.recipe, problem.targets
    results = Walk(problem.optima, problem.hessian.R, problem.hessian.h, targets, blocksize=recipe.blocksize,
                   saliency=recipe.saliency, scheme=recipe.scheme, dtype=problem.dtype,
                   row_weights=problem.row_weights).run()
    counts = any(target.sparsity for target in targets) and not targets[0].prunem
    return _filled_up(problem, results) if recipe.scheme and counts else results


def _filled_up(problem, results):
    """Remove the least salient ones of rounded weights, [(Ŵ, its Grid)], until each matrix meets its target."""
    W, counts = torch.cat([W for W, _ in results]), [len(W) for W, _ in results]
    scores = W.square() * problem.hessian.h
    if problem.row_weights is not None:
        scores *= problem.row_weights[:, None]
    masks = prune_masks(scores.masked_fill_(W == 0, -1).split(counts), problem.targets, distributed.total(counts))
    return [(W.masked_fill(mask, 0), grid) for (W, grid), mask in zip(results, masks, strict=True)]


def admm(problem):
    """Prune by `admm_pruner`; with a scheme, quantize the kept weights in a walk over the columns.

    Weights that are rounded to 0 count: the pruning target is lowered until both together meet the sparsity, but for a
    few weights; these are the least salient of the rounded ones.
    """
    later, sparsities = problem.recipe.later, [target.sparsity for target in problem.targets]
    hessian = problem.hessian
    prune = admm_pruner(problem.optima, hessian.damped, problem.targets, problem.row_weights, hessian.h == 0)

    def attempt(sparsities):
        pruned = prune([replace(target, sparsity=sparsity)
                        for target, sparsity in zip(problem.targets, sparsities, strict=True)])
        if problem.recipe.scheme:
            return quantize(replace(problem, optima=pruned))
        return [(quantize_nearest(W, later)[0] if later else W, W) for W in pruned]  # a guess of what will be 0

    exact = problem.targets[0].prunem or not (problem.recipe.scheme or later)
    results = attempt(sparsities) if exact else meet_sparsities(attempt, sparsities, margin_sigmas=MARGIN_SIGMAS)
    return results if problem.recipe.scheme else [(W, None) for _, W in results]


def quantize(problem):
    """Quantize the kept weights in a walk over the columns, then remove the least salient ones up to the sparsity."""
    return _filled_up(problem, walk(replace(problem, targets=[Target(0.0)] * len(problem.optima))))


@dataclass(frozen=True)
class Recipe:
    """How to prune and quantize matrices on calibration inputs."""

    solver: Callable = walk  # of a Problem
    blocksize: int = 128  # columns whose mask is chosen at once
    saliency: Callable = obs_saliency
    scheme: Scheme | None = None  # quantization of the kept weights
    percdamp: float = 0.01  # of each Hessian, as a fraction of its mean diagonal
    act_order: bool = False  # walk the columns in `hessian.activation_order`
    true_sequential: bool = True  # calibrate a linear on inputs from the pruned linears before it in its layer
    dense_target: bool = False  # regress towards the dense model's outputs
    light_first: bool = False  # weigh tokens by `dense_target.first_token_weights`, with that target
    rotate: bool = False  # first rotate the heads of a layer by `rotation.rotate_heads`
    row_weights: dict | None = None  # {(layer, name): (out,)}, weight of each row's error
    title: str = "SparseGPT"  # of the progress bar
    later: Scheme | None = None  # quantization by `quantize`, once they are distilled


def prune_in_place(hessian, weights, targets, recipe, row_weights=None):
    """Prune and quantize `weights`, a list of matrices (out, in) of one dtype that read one input, in place.

    hessian: InputHessian, factored. targets: a Target per matrix. row_weights: (total rows,). Returns the
    relative error of each, a float64 tensor on its device, and its quant.Grid, None if it is not quantized. Every
    process prunes its share of the rows of each matrix, and gets those of the others.
    """
    dtype, sizes = weights[0].dtype, [len(weight) for weight in weights]
    shares = [weight[distributed.share(len(weight))] for weight in weights]
    W, counts = torch.cat(shares).float(), [len(rows) for rows in shares]
    if row_weights is not None:
        row_weights = torch.cat([of_rows[distributed.share(len(of_rows))] for of_rows in row_weights.split(sizes)])
        # those of an expert without tokens are 0, but its scores shall differ
        row_weights.clamp_(min=torch.finfo(row_weights.dtype).tiny ** 0.5)
    whole = torch.linalg.vecdot(W @ hessian.H, W)  # ‖w X‖² of every row w
    optima = list(hessian.optimum(W).split(counts))
    pruned = recipe.solver(Problem(hessian, optima, targets, recipe, dtype, row_weights))
    W_hat = torch.cat([matrix for matrix, _ in pruned])[:, hessian.inverse_order].to(dtype)
    W.sub_(W_hat)
    lost = torch.linalg.vecdot(W @ hessian.H, W)
    sums = torch.stack([rows.sum() for forms in (lost, whole) for rows in forms.split(counts)]).double()
    distributed.all_reduce(sums)
    lost, whole = sums.chunk(2)
    errors = torch.where(whole == 0, 0.0, lost.clamp_min(0) / whole)
    for weight, new in zip(weights, distributed.all_gather_shares(W_hat.split(counts), sizes), strict=True):
        weight.copy_(new)
    return [(error, grid and replace(grid.gathered(rows), group=grid.group[hessian.inverse_order]))
            for error, rows, (_, grid) in zip(errors, sizes, pruned, strict=True)]
