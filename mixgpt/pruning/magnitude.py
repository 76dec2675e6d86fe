"""Magnitude pruning and round-to-nearest quantization, without calibration: the baselines."""

from dataclasses import replace

import torch

from mixgpt.common import distributed
from mixgpt.kernels.selection import smallest, smallest_per_row
from mixgpt.pruning.layerwise import layers_in_turn
from mixgpt.pruning.targets import Outcome
from modelutils import linears
from quant import meet_sparsities, quantize_nearest


@torch.no_grad()
def prune_magnitude(streamed, plan, scheme=None, files=None, observe=None):
    """Prune every matrix of the plan by magnitude and round it to the nearest values of the scheme's grid, in place.

    streamed, plan, files, observe: as in `layerwise.prune_layerwise`. Returns {(layer, name): Outcome}.
    """
    title = "magnitude" if any(target.sparsity for target in plan.values()) else "nearest"
    outcomes = {}
    for index, layer, new, _ in layers_in_turn(streamed, streamed.layers, title, outcomes, files, observe):
        for name, module in linears(layer).items():
            if target := plan.get((index, name)):
                rows = len(module.weight)
                W, grid = _by_magnitude(module.weight[distributed.share(rows)], target, scheme)
                module.weight.copy_(*distributed.all_gather_shares([W], [rows]))
                new[index, name] = Outcome(grid=grid and grid.gathered(rows).to("cpu"))
    return outcomes


def _by_magnitude(W, target, scheme):
    if scheme is None:
        return magnitude_prune(W, target), None
    (W, grid), = meet_sparsities(
        lambda sparsities: [quantize_nearest(magnitude_prune(W, replace(target, sparsity=sparsities[0])), scheme)],
        [target.sparsity], attempts=1 if target.prunem else 4)
    return W, grid


def magnitude_prune(W, target):
    """Set the weights of smallest magnitude to 0, as many as a Target says, and leave the others unchanged.

    W: (out, in); in several processes, some of the rows of a matrix. Returns a new tensor (out, in).
    """
    scores = W.abs().float()
    if target.prunem:
        mask = smallest_per_row(scores.reshape(-1, target.prunem), target.prunen).view(W.shape)
    else:
        rows, = distributed.total([len(W)])
        mask, = smallest([scores], [round(target.sparsity * (rows * W.shape[1]))], [rows])
    return W.masked_fill(mask, 0)
