"""Wanda and OWL written down plainly, as peers of the benchmarks: what the formulas of their papers say."""

import contextlib
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch

from mixgpt.common.choices import ALLOCATIONS, SOLVERS, Allocation, Solver
from mixgpt.modeling.linears import hooked, linears
from mixgpt.modeling.placing import in_turn
from mixgpt.pruning.targets import Target
from mixgpt.quant import meet_sparsities, quantize_nearest

OUTLIER = 5.0  # M of OWL: an outlier exceeds M times the mean
RANGE = 0.08  # λ of OWL: half of the distance between the sparsest and the densest layer
PEERS = {  # flags of a run, where `registered`; Wanda's own calibration is two passes
    "magnitude": "--gmp",
    "wanda": "--solver wanda --no-true-sequential",
    "owl": "--sparsity-way owl",
}


def wanda_mask(W, norms, target):
    """Mark the weights of smallest |W_ij| · ‖X_j‖₂, in every row or, with n:m, in every group of a row.

    W: (out, in). norms: (in,), ‖X_j‖₂. target: a Target. Wanda (arXiv 2306.11695), eq. 1. A row loses a whole number
    of weights; cumulative rounding makes round(sparsity · numel) of them in all.
    """
    scores = (W.abs().float() * norms).reshape(-1, target.prunem or W.shape[1])
    if target.prunem:
        counts = target.prunen
    else:
        ends = [round(target.sparsity * W.shape[1] * row) for row in range(len(W) + 1)]
        counts = torch.tensor(ends, device=W.device).diff()[:, None]
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return (ranks < counts).view(W.shape)


def wanda(problem):
    """Solve a mixgpt.pruning.solvers.Problem by Wanda, without update. What rounding sets to 0 counts as pruned."""
    scheme = problem.recipe.scheme

    def attempt(sparsities):
        pruned = [W.masked_fill(wanda_mask(W, problem.hessian.h.sqrt(), replace(target, sparsity=sparsity)), 0)
                  for W, target, sparsity in zip(problem.optima, problem.targets, sparsities, strict=True)]
        return [quantize_nearest(W, scheme) if scheme else (W, None) for W in pruned]

    return meet_sparsities(attempt, [target.sparsity for target in problem.targets], attempts=4 if scheme else 1)


@torch.no_grad()
def outlier_ratios(streamed, tokens):
    """Return D_l of each layer of the dense model: the share of A_ij = ‖X_j‖₂ · |W_ij| of all its matrices together
    that exceeds OUTLIER times their mean, on tokens (N, T). OWL (arXiv 2310.05175), section 3."""
    ratios, device, stream = [], streamed.device, streamed.embed(tokens)

    def add(sums, X):
        sums += X.float().square().flatten(0, -2).sum(0)

    for index, layer in in_turn(streamed.layers, device, "OWL"):
        squares = {module: torch.zeros(module.in_features, device=device) for module in linears(layer).values()}
        with hooked({module: partial(add, sums) for module, sums in squares.items()}):
            stream.advance(layer, index)
        A = torch.cat([(module.weight.abs().float() * sums.sqrt()).flatten() for module, sums in squares.items()])
        ratios.append((A > OUTLIER * A.mean()).double().mean().item())
    return ratios


def owl_plan(selected, ratios, sparsity):
    """Make layers with more outliers less sparse. Returns {(layer, name): Target}.

    selected: {(layer, name): (out, in)}. ratios: D_l of each layer. As the authors do: the ratios are scaled to
    [0, 2λ] and, negated, shifted to the mean that is asked for; λ is less where a sparsity would leave [0, 1]. The mean
    is that over weights here, which is the same where layers are of one size.
    """
    sizes = torch.zeros(len(ratios), dtype=torch.float64)
    for (layer, _), (out, columns) in selected.items():
        sizes[layer] += out * columns
    D = torch.tensor(ratios, dtype=torch.float64)
    D = 2 * RANGE * (D - D.min()) / (D.max() - D.min()).clamp_min(1e-12)  # equal ratios: uniform
    D -= (D * sizes).sum() / sizes.sum()
    sparsities = sparsity - D * min(1, sparsity / D.max().clamp_min(1e-12), (1 - sparsity) / -D.min().clamp_max(-1e-12))
    return {(layer, name): Target(sparsities[layer].clamp(0, 1).item()) for layer, name in selected}


def owl(budget):
    """Allocate a mixgpt.allocation.plan.Budget as OWL does."""
    return owl_plan(budget.selected, outlier_ratios(budget.streamed, budget.calibration), budget.target.sparsity)


@contextlib.contextmanager
def registered():
    """Make --solver wanda and --sparsity-way owl known within the block."""
    solver = Solver("in each row by |w| ‖x‖, without update", wanda, "Wanda", quantizes=True)
    allocation = Allocation("by the outliers of the layer", owl, "OWL")
    with patch.dict(SOLVERS, wanda=solver), patch.dict(ALLOCATIONS, owl=allocation):
        yield
