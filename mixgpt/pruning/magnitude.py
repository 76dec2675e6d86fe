"""Magnitude pruning and round-to-nearest quantization, without calibration: the baselines."""

import time

import torch

from mixgpt.common import distributed, progress
from mixgpt.kernels.columns import smallest_per_row
from mixgpt.kernels.linalg import smallest
from mixgpt.modeling.streaming import prefetch
from mixgpt.pruning.targets import Outcome
from modelutils import linears, on_device
from quant import meet_sparsities, quantize_nearest


@torch.no_grad()
def prune_magnitude(streamed, plan, scheme=None, files=None, observe=None):
    """Prune every matrix of the plan by magnitude and round it to the nearest values of the scheme's grid, in place.

    streamed, plan, files, observe: as in `layerwise.prune_layerwise`. Returns {(layer, name): Outcome}.
    """
    title = "magnitude" if any(target.sparsity for target in plan.values()) else "nearest"
    layers, device = streamed.layers, streamed.device
    finished, outcomes = files.resume_from(len(layers)) if files else [], {}
    for index, of_layer in enumerate(finished):
        files.load_layer(index)
        outcomes |= of_layer
    first = len(finished)
    for index in progress.bar(range(first, len(layers)), title=title, initial=first, total=len(layers)):
        layer, new, start = layers[index], {}, time.perf_counter()
        with on_device([layer], device):
            prefetch(layers, index + 1, device)
            for name, module in linears(layer).items():
                if target := plan.get((index, name)):
                    rows = len(module.weight)
                    W, grid = _by_magnitude(module.weight[distributed.share(rows)], target, scheme)
                    module.weight.copy_(distributed.all_gather_shares(W, rows))
                    new[index, name] = Outcome(grid=grid and grid.gathered(rows).to("cpu"))
            if observe:
                observe(index, layer, new, start)
            if files:
                files.save_layer(index, layer, new)
        outcomes |= new
    if files:
        files.flush()
    return outcomes


def _by_magnitude(W, target, scheme):
    if scheme is None:
        return magnitude_prune(W, target.sparsity, target.prunen, target.prunem), None
    new, = meet_sparsities(lambda asked: [quantize_nearest(
        magnitude_prune(W, asked[0], target.prunen, target.prunem), scheme)], [target.sparsity],
        attempts=1 if target.prunem else 4)
    return new


def magnitude_prune(W, sparsity, prunen=0, prunem=0):
    """Set the weights of smallest magnitude to 0 and leave the others unchanged.

    W: (out, in); in several processes, some of the rows of a matrix. sparsity, prunen, prunem: as in
    `sparsegpt.prune_matrices`. Returns a new tensor (out, in).
    """
    scores = W.abs().float()
    if prunem:
        mask = smallest_per_row(scores.reshape(-1, prunem), prunen).view(W.shape)
    else:
        numel, = distributed.total([W.numel()])
        mask, = smallest([scores], [round(sparsity * numel)])
    return W.masked_fill(mask, 0)
