"""Score each weight by its effect on the model's loss, with one threshold for all matrices.

Notation: L the cross-entropy, y = W x a matrix's outputs, G_r = E[(∂L/∂y_r)²], H the Hessian of its input x. Removing
w_rc from the dense model, compensated by the other weights of its row, adds about w_rc² G_r / [H⁻¹]_cc to L: optimal
brain surgeon (arXiv 2301.00774, eq. 3) with the Fisher matrix of a row approximated by G_r H.
"""

import itertools
import math
from functools import partial

import torch

from mixgpt.allocation.ranking import threshold_counts
from mixgpt.common import distributed, progress
from mixgpt.kernels.linalg import upper_inverse
from mixgpt.kernels.matmul import fast_linears
from mixgpt.modeling.streaming import prefetch
from mixgpt.pruning.calibration import groups_of, hessians_of
from mixgpt.pruning.targets import Target
from modelutils import hooked, linears, on_device


def by_threshold(budget):
    """Measure H, and set the sparsity of each matrix of a plan.Budget by one global threshold."""
    execution = budget.execution
    with execution.clock.part("allocation"):
        diagonals = inverse_diagonals(execution, list(budget.selected), budget.calibration, budget.percdamp)
        return global_plan(execution.model, execution.family, budget.selected, budget.gradients.rows, diagonals,
                           budget.target.sparsity, budget.alpha)


@torch.no_grad()
@fast_linears()
def inverse_diagonals(execution, matrices, tokens, percdamp):
    """Return [(H + λI)⁻¹]_cc for the input of each matrix in the dense model, {(layer, name): (in,)} on the host.

    execution: a modelutils.Execution. matrices: list of (layer, name). tokens: (N, T). H is the mean over tokens, to
    be comparable across matrices.
    """
    stream, device = execution.embed(tokens[distributed.share(len(tokens))]), execution.device
    layers, shared, diagonals = execution.layers[:max(index for index, _ in matrices) + 1], {}, {}
    for index, layer in enumerate(progress.bar(layers, title="inputs")):
        with on_device([layer], device):
            prefetch(layers, index + 1, device)
            groups = groups_of(layer, index, stream, matrices, shared)
            hessians, read = hessians_of(layer, stream, groups, tokens.numel(), execution.clock)
            with hooked({module: partial(read, module) for module in hessians}):
                stream.advance(layer, index)
            for group, hessian in zip(groups, hessians.values(), strict=True):
                hessian.reduce()
                hessian.factor(percdamp)
                diagonal = upper_inverse(hessian.R).square().sum(0).cpu()  # H⁻¹ = Uᵀ U
                diagonals |= {(index, name): diagonal for name in group}
    return diagonals


@torch.no_grad()
def global_plan(model, family, selected, gradients, diagonals, sparsity, spread):
    """Set every matrix's sparsity by one threshold on w² G_r / [H⁻¹]_cc, clipped to sparsity ± spread.

    selected: {(layer, name): (out, in)}. gradients: {(layer, name): G (out,)}. diagonals: from `inverse_diagonals`.
    Removes exactly round(sparsity · all weights). Returns {(layer, name): Target}.
    """
    layers, sizes = family.layers_of(model), [out * columns for out, columns in selected.values()]

    def scores():
        for index, keys in itertools.groupby(enumerate(selected), key=lambda pair: pair[1][0]):
            with on_device([layers[index]], "cpu"):
                for unit, (_, name) in keys:
                    W = linears(layers[index])[name].weight.float()
                    yield unit, W.square() * gradients[index, name][:, None] / diagonals[index, name]

    least = [int(max(sparsity - spread, 0) * size) for size in sizes]
    most = [math.ceil(min(sparsity + spread, 1) * size) for size in sizes]
    counts = threshold_counts(scores, least, most, round(sparsity * sum(sizes)))
    return {key: Target(count / size) for key, count, size in zip(selected, counts, sizes, strict=True)}
