"""Solvers, which prune and quantize the matrices that read one input, and the recipe that selects one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType

import torch
from torch import Tensor

from mixgpt.common import distributed
from mixgpt.modeling.linears import Key
from mixgpt.pruning.admm import admm_pruner, prune_masks
from mixgpt.pruning.hessian import InputHessian
from mixgpt.pruning.masks import Masks
from mixgpt.pruning.targets import Target
from mixgpt.quant import Grid, Scheme, meet_sparsities, quantize_nearest
from mixgpt.sparsegpt import Walk, obs_saliency

MARGIN_SIGMAS = 3  # `meet_sparsities` aims so far below, so that the walk rounds too few weights to 0, not too many.
Result = list[tuple[Tensor, Grid | None]]  # Ŵ of each matrix, (out, in), and its grid if it is quantized.


@dataclass(frozen=True)
class Problem:
    """Input of a solver: the matrices that read one input, of each this process's share of the rows, and their targets.

    Columns are in the order of the walk. A solver returns a `Result` in the order of `optima`; zeros must stay zeros.
    """

    hessian: InputHessian  # Factored.
    optima: list[Tensor]  # W* (out, in) of each matrix, float32: the unconstrained optimum.
    targets: list[Target]  # The target of each matrix.
    totals: list[int]  # The rows of each matrix in all processes.
    recipe: "Recipe"
    dtype: torch.dtype  # The dtype of the final weights.
    row_weights: Tensor | None = None  # (total rows,), the weight of each row's error.
    masks: list[Tensor] | None = None  # (out, in) of each matrix, mark the weights to prune if they are given.


def walk(problem: Problem) -> Result:
    """Walk once over the columns: SparseGPT, and GPTQ if there is a scheme."""
    recipe, targets = problem.recipe, problem.targets
    results = Walk(problem.optima, problem.hessian.R, problem.hessian.h, targets, blocksize=recipe.blocksize,
                   saliency=recipe.saliency, scheme=recipe.scheme, dtype=problem.dtype,
                   row_weights=problem.row_weights, totals=problem.totals).run()
    counts = any(target.sparsity for target in targets) and not targets[0].prunem
    return _filled_up(problem, results) if recipe.scheme and counts else results


def _filled_up(problem: Problem, results: Result) -> Result:
    """Remove the least salient of rounded weights until each matrix meets its target."""
    W, counts = torch.cat([W for W, _ in results]), [len(W) for W, _ in results]
    scores = W.square() * problem.hessian.h
    if problem.row_weights is not None:
        scores *= problem.row_weights[:, None]
    masks = prune_masks(scores.masked_fill_(W == 0, -1).split(counts), problem.targets, problem.totals)
    return [(W.masked_fill(mask, 0), grid) for (W, grid), mask in zip(results, masks, strict=True)]


def admm(problem: Problem) -> Result:
    """Prune by `admm_pruner`; with a scheme, quantize the kept weights in a walk over the columns.

    Weights that are rounded to 0 count: the pruning target is lowered until both together meet the sparsity, but for a
    few weights; these are the least salient of the rounded ones.
    """
    later, sparsities = problem.recipe.later, [target.sparsity for target in problem.targets]
    hessian = problem.hessian
    prune = admm_pruner(problem.optima, hessian.damped, problem.targets, problem.row_weights, hessian.h == 0,
                        problem.totals, problem.masks)

    def attempt(sparsities: Sequence[float]) -> list[tuple]:
        pruned = prune([replace(target, sparsity=sparsity)
                        for target, sparsity in zip(problem.targets, sparsities, strict=True)])
        if problem.recipe.scheme:
            return quantize(replace(problem, optima=pruned))
        return [(quantize_nearest(W, later)[0] if later else W, W) for W in pruned]  # This guesses what will be 0.

    exact = problem.targets[0].prunem or problem.masks or not (problem.recipe.scheme or later)
    results = attempt(sparsities) if exact else meet_sparsities(attempt, sparsities, margin_sigmas=MARGIN_SIGMAS)
    return results if problem.recipe.scheme else [(W, None) for _, W in results]


def quantize(problem: Problem) -> Result:
    """Quantize the kept weights in a walk over the columns, then remove the least salient ones up to the sparsity."""
    return _filled_up(problem, walk(replace(problem, targets=[Target(0.0)] * len(problem.optima))))


@dataclass(frozen=True)
class Recipe:
    """How to prune and quantize matrices on calibration inputs."""

    solver: FunctionType = walk  # Its argument is a `Problem`; it returns a `Result`.
    blocksize: int = 128  # Columns whose mask is chosen at once.
    saliency: Callable = obs_saliency
    scheme: Scheme | None = None  # Quantization of the kept weights.
    percdamp: float = 0.01  # Damping of each Hessian, as a fraction of its mean diagonal.
    act_order: bool = False  # Walk the columns in `hessian.activation_order`.
    true_sequential: bool = True  # Calibrate a linear on inputs from the pruned linears before it in its layer.
    fits_dense: bool = False  # Fit each linear to the dense model's outputs, too: see `dense_target`.
    light_first: bool = False  # If so, weigh tokens by `dense_target.first_token_weights`.
    rotate: bool = False  # First rotate the heads of a layer by `rotation.rotate_heads`.
    row_weights: dict[Key, Tensor] | None = None  # (out,), the weight of each row's error.
    title: str = "SparseGPT"  # Title of the progress bar.
    later: Scheme | None = None  # Quantization by `quantize`, once the weights are distilled.
    dtype: torch.dtype | None = None  # The dtype to which weights are rounded; default: theirs in memory.
    masks: Masks | None = None  # The weights to prune if they are given.


def prune_in_place(hessian: InputHessian, weights: list[Tensor], targets: list[Target], recipe: Recipe,
                   row_weights: Tensor | None = None, masks: list[Tensor] | None = None
                   ) -> list[tuple[Tensor, Grid | None]]:
    """Prune and quantize `weights`, matrices (out, in) of one dtype that read one input, in place.

    hessian: factored. row_weights: (total rows,). masks: (out, in), mark the weights to prune if they are given.
    Returns the relative error of each matrix, a float64 tensor on its device, and its grid. Every process prunes its
    share of the rows of each matrix, and gets those of the others.
    """
    dtype, sizes = recipe.dtype or weights[0].dtype, [len(weight) for weight in weights]
    shares = [weight[distributed.share(len(weight))] for weight in weights]
    W, counts = torch.cat(shares).float(), [len(rows) for rows in shares]
    if row_weights is not None:
        row_weights = torch.cat([part[distributed.share(len(part))] for part in row_weights.split(sizes)])
        # An expert without tokens has weights of 0, but its scores must differ.
        row_weights.clamp_(min=torch.finfo(row_weights.dtype).tiny ** 0.5)
    whole = torch.linalg.vecdot(W @ hessian.H, W)  # ‖w X‖² of every row w
    optima = list(hessian.optimum(W).split(counts))
    masks = masks and [mask[distributed.share(len(mask))][:, hessian.order] for mask in masks]
    pruned = recipe.solver(Problem(hessian, optima, targets, sizes, recipe, dtype, row_weights, masks))
    W_hat = torch.cat([matrix for matrix, _ in pruned])[:, hessian.inverse_order].to(dtype)
    W.sub_(W_hat)
    lost = torch.linalg.vecdot(W @ hessian.H, W)
    sums = torch.stack([rows.sum() for forms in (lost, whole) for rows in forms.split(counts)]).double()
    *matrices, sums = distributed.all_gather_shares([*W_hat.split(counts), sums[None]], [*sizes, distributed.world()])
    lost, whole = sums.sum(0).chunk(2)
    errors = torch.where(whole == 0, 0.0, lost.clamp_min(0) / whole)
    for weight, new in zip(weights, matrices, strict=True):
        weight.copy_(new)
    return [(error, grid and replace(grid.gathered(rows), group=grid.group[hessian.inverse_order]))
            for error, rows, (_, grid) in zip(errors, sizes, pruned, strict=True)]
