"""Score each weight by its effect on the model's loss, with one threshold for all matrices.

Notation: L the cross-entropy, y = W x a matrix's outputs, G_r = E[(∂L/∂y_r)²], H the Hessian of its input x. Removing
w_rc from the dense model, compensated by the other weights of its row, adds about w_rc² G_r / [H⁻¹]_cc to L: optimal
brain surgeon (arXiv 2301.00774, eq. 3) with the Fisher matrix of a row approximated by G_r H.
"""

import math
from functools import partial

import torch

from mixgpt.common import distributed, progress
from mixgpt.kernels.linalg import upper_inverse
from mixgpt.modeling.streaming import prefetch
from mixgpt.pruning.calibration import groups_of, hessians_of
from mixgpt.pruning.targets import Target
from modelutils import hooked, linears, on_device


def by_threshold(budget):
    """Set the sparsity of each matrix of a plan.Budget by one global threshold."""
    gradients = budget.gradients
    with budget.streamed.clock.part("allocation"):
        return global_plan(budget.streamed, budget.selected, gradients.rows, gradients.diagonals,
                           budget.target.sparsity, budget.alpha)


@torch.no_grad()
def inverse_diagonals(streamed, matrices, tokens, percdamp):
    """Return [(H + λI)⁻¹]_cc for the input of each matrix in the dense model, {(layer, name): (in,)} on the host.

    streamed: a modelutils.StreamedModel. matrices: list of (layer, name). tokens: (N, T). H is the mean over tokens, to
    be comparable across matrices.
    """
    stream, device = streamed.embed(tokens[distributed.share(len(tokens))]), streamed.device
    layers, shared, diagonals = streamed.layers[:max(index for index, _ in matrices) + 1], {}, {}
    for index, layer in enumerate(progress.bar(layers, title="inputs")):
        with on_device([layer], device):
            prefetch(layers, index + 1, device)
            groups = groups_of(layer, index, stream, matrices, shared)
            hessians, read = hessians_of(layer, stream, groups, tokens.numel(), streamed.clock)
            with hooked({module: partial(read, module) for module in hessians}):
                stream.advance(layer, index)
            for group, hessian in zip(groups, hessians.values(), strict=True):
                hessian.reduce()
                hessian.factor(percdamp)
                diagonal = upper_inverse(hessian.R).square().sum(0).cpu()  # H⁻¹ = Uᵀ U
                diagonals |= {(index, name): diagonal for name in group}
    return diagonals


@torch.no_grad()
def global_plan(streamed, selected, gradients, diagonals, sparsity, alpha):
    """Set every matrix's sparsity by one threshold on w² G_r / [H⁻¹]_cc, clipped to sparsity ± alpha.

    streamed: a modelutils.StreamedModel. selected: {(layer, name): (out, in)}. gradients: {(layer, name): G (out,)}.
    diagonals: from `inverse_diagonals`. Removes exactly round(sparsity · all weights). Returns {(layer, name): Target}.
    """
    sizes, device = [out * columns for out, columns in selected.values()], streamed.device
    layers = {index: streamed.layers[index] for index, _ in selected}

    def scores():
        for place, (index, layer) in enumerate(layers.items()):
            with on_device([layer], device):
                prefetch(list(layers.values()), place + 1, device)
                modules = linears(layer)
                for unit, key in enumerate(selected):
                    if key[0] == index:
                        G, diagonal = (values[key].to(device) for values in (gradients, diagonals))
                        yield unit, modules[key[1]].weight.float().square().mul_(G[:, None]).div_(diagonal)

    least = [int(max(sparsity - alpha, 0) * size) for size in sizes]
    most = [math.ceil(min(sparsity + alpha, 1) * size) for size in sizes]
    counts = threshold_counts(scores, least, most, round(sparsity * sum(sizes)))
    return {key: Target(count / size) for key, count, size in zip(selected, counts, sizes, strict=True)}


def threshold_counts(scores, least, most, total):
    """Count how many weights of each unit one common threshold removes, exactly `total` of all.

    scores: function that yields (unit index, non-negative float32 scores of all its weights, on any device), the same
    on both of two calls. least, most: lists of ints, the fewest and the most weights that a unit may lose; total lies
    between their sums. Ties at the threshold are removed from the first units. Returns a list of ints.

    Non-negative floats sort like their bit patterns: a radix select, one pass for the threshold's upper 16 bits and one
    for the lower.
    """
    least, most = torch.tensor(least)[:, None], torch.tensor(most)[:, None]
    below, prefix = torch.zeros(len(least), 1, dtype=torch.int64), 0
    for shift in (16, 0):
        counts = torch.zeros(len(least), 1 << 16, dtype=torch.int64)
        for unit, values in scores():
            bits = values.flatten().view(torch.int32)
            if not shift:
                bits = bits[bits >> 16 == prefix]
            counts[unit] += torch.bincount(bits >> shift & 0xFFFF, minlength=1 << 16).cpu()
        counts.cumsum_(1).add_(below)  # number of scores up to each value of these bits
        digit = int((counts.clamp(least, most).sum(0) >= total).int().argmax())
        reached, below = counts[:, digit:digit + 1], counts[:, digit - 1:digit] if digit else below
        prefix = digit
    reached, below = reached.clamp(least, most).flatten(), below.clamp(least, most).flatten()
    spare = (reached - below).flip(0)
    surplus = int(reached.sum()) - total
    return (reached - (surplus - spare.cumsum(0) + spare).clamp_min(0).minimum(spare).flip(0)).tolist()
