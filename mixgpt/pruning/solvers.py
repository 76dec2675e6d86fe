"""The solvers, which prune and quantize the matrices that read one input from its Hessian."""

from dataclasses import replace

import torch

from mixgpt.kernels.linalg import damping
from mixgpt.pruning.admm import admm_pruner
from quant import meet_sparsities
from sparsegpt import prune_matrices, relative_errors

SOLVERS = {"obs": "SparseGPT", "admm": "ADMM"}


def prune_in_place(hessian, weights, targets, solver="obs", row_weights=None, scheme=None, **options):
    """Prune and quantize `weights`, a list of matrices (out, in) of one dtype, in place.

    hessian: a SparseGPT, factored. targets, row_weights and options: as in `prune_matrices`. solver: obs, by one walk;
    admm, by `admm_pruner`, and the walk only quantizes. Returns the `relative_error` and the quant.Grid of each, None
    where it is not quantized.
    """
    h, dtype, counts = hessian.H.diagonal()[hessian.order], weights[0].dtype, [len(weight) for weight in weights]
    W = torch.cat([weight.float() for weight in weights])
    wanted = hessian.wanted(W).split(counts)

    def walk(matrices, targets):
        return prune_matrices(matrices, hessian.R, h, targets, dtype=dtype, row_weights=row_weights, scheme=scheme,
                              **options)

    if solver == "obs":
        pruned = walk(wanted, targets)
    else:
        pruned = _by_admm(hessian, wanted, targets, row_weights, scheme, walk)
    W_hat = torch.cat([matrix for matrix, _ in pruned])[:, hessian.back].to(dtype)
    errors = relative_errors(W, W_hat.float(), hessian.H, counts)
    for weight, new in zip(weights, W_hat.split(counts), strict=True):
        weight.copy_(new)
    return [(error, grid and replace(grid, group=grid.group[hessian.back]))
            for error, (_, grid) in zip(errors, pruned, strict=True)]


def _by_admm(hessian, wanted, targets, row_weights, scheme, walk):
    """Prune by ADMM; with a scheme, let the walk round what is left, so often that what it rounds to 0 is counted in.

    Returns [(Ŵ, its Grid or None)], columns in the order of the walk.
    """
    H = hessian.H[hessian.order][:, hessian.order].clone()
    H.diagonal().add_(damping(H, hessian.percdamp))
    prune = admm_pruner(wanted, H, targets, row_weights)
    if scheme is None:
        return [(matrix, None) for matrix in prune(targets)]
    return meet_sparsities(
        lambda asked: walk(prune([(sparsity, *groups) for sparsity, (_, *groups)
                                  in zip(asked, targets, strict=True)]), [(0.0,)] * len(targets)),
        [sparsity for sparsity, *_ in targets], attempts=1 if any(targets[0][1:]) else 4)
