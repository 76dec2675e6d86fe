"""Score each weight by its effect on the model's loss, with one threshold for all matrices.

Notation: L the cross-entropy, y = W x a matrix's outputs, G_r = E[(∂L/∂y_r)²], H the Hessian of its input x. Removing
w_rc from the dense model, compensated by the other weights of its row, adds about w_rc² G_r / [H⁻¹]_cc to L: optimal
brain surgeon (arXiv 2301.00774, eq. 3) with the Fisher matrix of a row approximated by G_r H.
"""

import contextlib
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
    """Set the sparsity of each matrix of a plan.Budget by one global threshold."""
    gradients = budget.gradients
    with budget.streamed.clock.part("allocation"):
        return global_plan(budget.streamed, budget.selected, gradients.rows, gradients.diagonals,
                           budget.target.sparsity, budget.alpha)


class InverseDiagonals:
    """Measures [(H + λI)⁻¹]_cc for the input of each matrix while the dense model runs, layer by layer.

    H is the mean over tokens, to be comparable across matrices.
    """

    def __init__(self, matrices, ntokens, percdamp, clock):
        """matrices: list of (layer, name). ntokens: over all processes."""
        self.matrices, self.ntokens, self.percdamp, self.clock = matrices, ntokens, percdamp, clock
        self.diagonals = {}  # (layer, name) -> (in,), on the host
        self._shared = {}  # see `groups_of`

    @contextlib.contextmanager
    def measuring(self, layer, index, stream):
        """Measure the inputs of layer number `index`, which reads the hidden states of a stream within the block."""
        groups = groups_of(layer, index, stream, self.matrices, self._shared)
        hessians, read = hessians_of(layer, stream, groups, self.ntokens, self.clock)
        with hooked({module: partial(read, module) for module in hessians}):
            yield
        if not groups:
            return
        diagonals = [self._diagonal(hessian) for hessian in hessians.values()]
        together = torch.cat(diagonals).cpu()
        for group, diagonal in zip(groups, together.split([len(each) for each in diagonals]), strict=True):
            self.diagonals |= {(index, name): diagonal for name in group}

    def _diagonal(self, hessian):
        hessian.reduce()
        hessian.factor(self.percdamp)
        return upper_inverse(hessian.R).square().sum(0)  # H⁻¹ = Uᵀ U


@torch.no_grad()
@fast_linears()
def inverse_diagonals(streamed, matrices, tokens, percdamp):
    """Return [(H + λI)⁻¹]_cc for the input of each matrix in the dense model, {(layer, name): (in,)} on the host.

    streamed: a modelutils.StreamedModel. matrices: list of (layer, name). tokens: (N, T). See `InverseDiagonals`.
    """
    stream, device = streamed.embed(tokens[distributed.share(len(tokens))]), streamed.device
    layers = streamed.layers[:max(index for index, _ in matrices) + 1]
    inputs = InverseDiagonals(matrices, tokens.numel(), percdamp, streamed.clock)
    for index, layer in enumerate(progress.bar(layers, title="inputs")):
        with on_device([layer], device):
            prefetch(layers, index + 1, device)
            with inputs.measuring(layer, index, stream):
                stream.advance(layer, index)
    return inputs.diagonals


@torch.no_grad()
def global_plan(streamed, selected, gradients, diagonals, sparsity, spread):
    """Set every matrix's sparsity by one threshold on w² G_r / [H⁻¹]_cc, clipped to sparsity ± spread.

    streamed: a modelutils.StreamedModel. selected: {(layer, name): (out, in)}. gradients: {(layer, name): G (out,)}.
    diagonals: from `inverse_diagonals`. Removes exactly round(sparsity · all weights). Returns {(layer, name): Target}.
    """
    sizes, device = [out * columns for out, columns in selected.values()], streamed.device
    units = {index: list(keys) for index, keys in itertools.groupby(enumerate(selected), key=lambda pair: pair[1][0])}
    layers = [streamed.layers[index] for index in units]

    def scores():
        for place, (index, keys) in enumerate(units.items()):
            with on_device([layers[place]], device):
                prefetch(layers, place + 1, device)
                modules = linears(layers[place])
                for unit, (_, name) in keys:
                    G, diagonal = (values[index, name].to(device) for values in (gradients, diagonals))
                    yield unit, modules[name].weight.float().square().mul_(G[:, None]).div_(diagonal)

    least = [int(max(sparsity - spread, 0) * size) for size in sizes]
    most = [math.ceil(min(sparsity + spread, 1) * size) for size in sizes]
    counts = threshold_counts(scores, least, most, round(sparsity * sum(sizes)))
    return {key: Target(count / size) for key, count, size in zip(selected, counts, sizes, strict=True)}
