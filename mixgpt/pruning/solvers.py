"""Solvers, which prune and quantize the matrices that read one input, and the recipe that selects one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mixgpt.kernels.linalg import damping
from mixgpt.pruning.admm import admm_pruner
from quant import meet_sparsities
from sparsegpt import SparseGPT, WalkOptions, prune_matrices, relative_errors


@dataclass(frozen=True)
class Problem:
    """Input of a solver: the matrices that read one input, and their targets.

    Columns are in the order of the walk. A solver returns [(Ŵ, its quant.Grid or None)] in the order of `optima`;
    zeros of W* must be zeros of Ŵ.
    """

    hessian: SparseGPT  # factored
    optima: list[torch.Tensor]  # W* (out, in) of each, float32: the unconstrained optimum
    targets: list[tuple]  # (sparsity, prunen, prunem) of each
    options: WalkOptions
    dtype: torch.dtype  # of the final weights
    row_weights: torch.Tensor | None = None  # (total rows,), weight of each row's error

    @property
    def h(self):
        """The diagonal of H, (in,)."""
        return self.hessian.H.diagonal()[self.hessian.order]

    @property
    def damped(self):
        """H + λI (in, in)."""
        H = self.hessian.H[self.hessian.order][:, self.hessian.order].clone()
        H.diagonal().add_(damping(H, self.hessian.percdamp))
        return H


def walk(problem):
    """Walk once over the columns: SparseGPT, and GPTQ if there is a scheme."""
    return prune_matrices(problem.optima, problem.hessian.R, problem.h, problem.targets, problem.options, problem.dtype,
                          problem.row_weights)


def admm(problem):
    """Prune by `admm_pruner`; with a scheme, quantize the kept weights in a walk over the columns, and prune fewer
    weights by as many as that rounds to 0."""
    prune = admm_pruner(problem.optima, problem.damped, problem.targets, problem.row_weights)
    if problem.options.scheme is None:
        return [(W, None) for W in prune(problem.targets)]

    def attempt(sparsities):
        pruned = prune([(sparsity, *groups) for sparsity, (_, *groups)
                        in zip(sparsities, problem.targets, strict=True)])
        return walk(replace(problem, optima=pruned, targets=[(0.0,)] * len(pruned)))

    return meet_sparsities(attempt, [sparsity for sparsity, *_ in problem.targets],
                           attempts=1 if any(problem.targets[0][1:]) else 4)


@dataclass(frozen=True)
class Recipe:
    """How to prune and quantize matrices on calibration inputs."""

    solver: Callable = walk
    options: WalkOptions = WalkOptions()
    percdamp: float = 0.01  # of each Hessian, as a fraction of its mean diagonal
    act_order: bool = False  # walk the columns in `sparsegpt.activation_order`
    true_sequential: bool = True  # calibrate a linear on inputs from the pruned linears before it in its layer
    dense_target: bool = False  # regress towards the dense model's outputs
    row_weights: dict | None = None  # {(layer, name): (out,)}, weight of each row's error
    token_weights: dict | None = None  # {(layer, name): (n, T)}, squared weights of this process's tokens, mean 1
    title: str = "SparseGPT"  # of the progress bar


def prune_in_place(hessian, weights, targets, recipe, row_weights=None):
    """Prune and quantize `weights`, a list of matrices (out, in) of one dtype that read one input, in place.

    hessian: a SparseGPT, factored. targets: (sparsity, prunen, prunem) per matrix. row_weights: (total rows,). Returns
    the `relative_error` and the quant.Grid of each, None if it is not quantized.
    """
    dtype, counts = weights[0].dtype, [len(weight) for weight in weights]
    W = torch.cat([weight.float() for weight in weights])
    optima = list(hessian.optimum(W).split(counts))
    pruned = recipe.solver(Problem(hessian, optima, targets, recipe.options, dtype, row_weights))
    W_hat = torch.cat([matrix for matrix, _ in pruned])[:, hessian.back].to(dtype)
    errors = relative_errors(W, W_hat.float(), hessian.H, counts)
    for weight, new in zip(weights, W_hat.split(counts), strict=True):
        weight.copy_(new)
    return [(error, grid and replace(grid, group=grid.group[hessian.back]))
            for error, (_, grid) in zip(errors, pruned, strict=True)]
