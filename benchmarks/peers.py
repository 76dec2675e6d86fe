"""Wanda and OWL written down plainly, as peers of the benchmarks: what the formulas of their papers say."""

import contextlib
from dataclasses import replace
from functools import partial

import torch

from mixgpt.app.choices import ALLOCATIONS, SOLVERS, Allocation, Solver
from mixgpt.common import progress
from mixgpt.kernels.matmul import fast_linears
from mixgpt.pruning.targets import Target
from modelutils import Stream, hooked, linears, on_device
from quant import meet_sparsities, quantize_nearest

OUTLIER = 5.0  # M of OWL: an outlier exceeds M times the mean
RANGE = 0.08  # λ of OWL: half of the distance between the sparsest and the densest layer


def wanda_mask(W, norms, target):
    """Mark the weights of smallest |W_ij| · ‖X_j‖₂, in every row or, with n:m, in every group of a row.

    W: (out, in). norms: (in,), ‖X_j‖₂. target: a prune.Target. Wanda (arXiv 2306.11695), eq. 1. A row loses a whole
    number of weights; cumulative rounding makes round(sparsity · numel) of them in all.
    """
    scores = (W.abs().float() * norms).reshape(-1, target.prunem or W.shape[1])
    if target.prunem:
        counts = target.prunen
    else:
        ends = [round(target.sparsity * W.shape[1] * row) for row in range(len(W) + 1)]
        counts = torch.tensor(ends, device=W.device).diff()[:, None]
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return (ranks < counts).view(W.shape)


def advance(stream, layer, index):
    """Run all sequences through a layer on the device. Returns ‖X_j‖₂ over all their tokens, {linear: (in,)}."""
    squares = {name: torch.zeros(module.in_features, device=stream.device) for name, module in linears(layer).items()}

    def add(name, X):
        squares[name] += X.float().square().flatten(0, -2).sum(0)

    with hooked({module: partial(add, name) for name, module in linears(layer).items()}):
        stream.advance(layer, index)
    return {name: total.sqrt() for name, total in squares.items()}


def visit(model, family, tokens, batch_size, device, title):
    """Yield (index, layer, stream of the hidden states of tokens (N, T)), each layer on the device in its turn."""
    stream = Stream.embed(model, family, tokens, batch_size, device)
    for index, layer in enumerate(progress.bar(family.layers_of(model), title=title)):
        with on_device([layer], device):
            yield index, layer, stream


def by_wanda(W, norms, target, scheme=None):
    """Prune W (out, in) by Wanda. norms: (in,), ‖X_j‖₂. Returns the new matrix, and its grid if there is a scheme.

    scheme: the quant.Scheme to whose grids the kept weights are rounded; what that sets to 0 counts as pruned.
    """
    def attempt(asked):
        pruned = W.masked_fill(wanda_mask(W, norms, replace(target, sparsity=asked[0])), 0)
        return [quantize_nearest(pruned, scheme) if scheme else (pruned, None)]

    new, = meet_sparsities(attempt, [target.sparsity], attempts=4 if scheme else 1)
    return new


@torch.no_grad()
@fast_linears()
def prune_wanda(model, family, plan, tokens, batch_size, device, scheme=None):
    """Prune every matrix by Wanda, as the plan says, on calibration tokens (N, T), in place; nothing is updated.

    Layers are calibrated on what the pruned layers before them give. scheme: the quant.Scheme to whose grids the kept
    weights are rounded, None: to none.
    """
    for index, layer, stream in visit(model, family, tokens, batch_size, device, "Wanda"):
        before = stream.hidden.clone()
        norms = advance(stream, layer, index)
        for name, module in linears(layer).items():
            W_hat, _ = by_wanda(module.weight, norms[name], plan[index, name], scheme)
            module.weight.copy_(W_hat)
        stream.hidden = before
        stream.advance(layer, index)


@torch.no_grad()
@fast_linears()
def outlier_ratios(model, family, tokens, batch_size, device):
    """Return D_l of each layer of the dense model: the share of A_ij = ‖X_j‖₂ · |W_ij| of all its matrices together
    that exceeds OUTLIER times their mean. OWL (arXiv 2310.05175), section 3."""
    ratios = []
    for index, layer, stream in visit(model, family, tokens, batch_size, device, "OWL"):
        norms = advance(stream, layer, index)
        A = torch.cat([(module.weight.abs().float() * norms[name]).flatten()
                       for name, module in linears(layer).items()])
        ratios.append((A > OUTLIER * A.mean()).double().mean().item())
    return ratios


def owl_plan(selected, ratios, sparsity):
    """Make layers with more outliers less sparse. Returns {(layer, name): Target}.

    selected: {(layer, name): (out, in)}. ratios: D_l of each layer. As the authors do: the ratios are scaled to
    [0, 2λ] and, negated, shifted to the mean that is asked for. The mean is that over weights here, which is the same
    where layers are of one size.
    """
    sizes = torch.zeros(len(ratios), dtype=torch.float64)
    for (layer, _), (out, columns) in selected.items():
        sizes[layer] += out * columns
    D = torch.tensor(ratios, dtype=torch.float64)
    D = 2 * RANGE * (D - D.min()) / (D.max() - D.min()).clamp_min(1e-12)  # equal ratios: uniform
    sparsities = sparsity - (D - (D * sizes).sum() / sizes.sum())
    total = (sparsities * sizes).sum() / sizes.sum()
    assert abs(total - sparsity) < 1e-9 and 0 <= sparsities.min() <= sparsities.max() <= 1
    return {(layer, name): Target(sparsities[layer].item()) for layer, name in selected}


@contextlib.contextmanager
def registered():
    """Make --solver wanda and --sparsity_way owl known within the block. Wanda's own calibration is two passes."""
    def wanda(problem):
        return [by_wanda(W, problem.h.sqrt(), Target(*target), problem.options.scheme)
                for W, target in zip(problem.optima, problem.targets, strict=True)]

    def owl(budget):
        where = budget.execution
        ratios = outlier_ratios(where.model, where.family, budget.calibration, where.batch_size, where.device)
        return owl_plan(budget.selected, ratios, budget.target.sparsity)

    SOLVERS["wanda"] = Solver("in each row by |w| ‖x‖, without update", wanda, "Wanda", quantizes=True)
    ALLOCATIONS["owl"] = Allocation("by the outliers of the layer", owl, "OWL")
    try:
        yield
    finally:
        del SOLVERS["wanda"], ALLOCATIONS["owl"]
