"""Measure perplexity and logits, one decoder layer at a time, and count the zeros of a model's weights."""

import itertools
import math
from dataclasses import dataclass

import torch

from mixgpt.common import distributed
from mixgpt.modeling.streaming import prefetch
from modelutils import SLICE, HiddenStates, linears, on_device, other_weights, run_layers


@torch.no_grad()
def perplexity(model, family, tokens, batch_size, device, title="perplexity", step=HiddenStates.advance):
    """Return exp of the mean negative log-likelihood of tokens (N, T), each sequence independently.

    T − 1 tokens of each sequence are predicted, as in SparseGPT and GPTQ. Logits in the model's dtype,
    log-likelihood in float32. title: of the progress bar. step: as `run_layers` takes it.
    """
    N, T = tokens.shape
    mine = tokens[distributed.share(N)]
    total = _negative_log_likelihood(model, family, mine, batch_size, device, title, step) if len(mine) else 0.0
    mean = sum(distributed.all_gather_object(total)) / (N * (T - 1))
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan  # exp overflows above 709


def _negative_log_likelihood(model, family, tokens, batch_size, device, title, step):
    """Return the negative log-likelihood summed over all predicted tokens."""
    stream = HiddenStates.embed(model, family, tokens, batch_size, device)
    run_layers(model, family, [stream], device, title, step)
    total = 0.0
    with stream.head(model, family) as head:
        for rows in stream.batches():
            hidden = stream.hidden[rows, :-1].to(device).flatten(0, 1)  # (B·(T−1), C)
            targets = tokens[rows, 1:].to(device).flatten()
            for h, t in zip(hidden.split(SLICE), targets.split(SLICE), strict=True):
                total += torch.nn.functional.cross_entropy(head(h).float(), t, reduction="sum").item()
    return total


@torch.no_grad()
def logits(model, family, tokens, batch_size, device):
    """Return the logits (N, T, vocabulary) of tokens (N, T) on the host, streamed."""
    stream = HiddenStates.embed(model, family, tokens, batch_size, device)
    run_layers(model, family, [stream], device, "logits")
    with stream.head(model, family) as head:
        return torch.cat([head(hidden.to(device)).to("cpu") for hidden in stream.hidden.flatten(0, 1).split(SLICE)]
                         ).unflatten(0, tokens.shape)


@dataclass(frozen=True)
class MatrixSparsity:
    """Zeros counted in one linear of one decoder layer, or in other weights of it."""

    layer: int
    name: str
    shape: tuple[int, ...]
    zeros: int

    @property
    def numel(self):
        return math.prod(self.shape)


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros counted in the weights of one decoder layer on its device, where the numbers stay until they are read."""

    layer: int
    shapes: dict  # {name: shape}, of the linears first
    nlinears: int
    zeros: torch.Tensor  # (weights,)

    def read(self):
        """Return a `MatrixSparsity` of every linear, and of all other weights, see `other_weights`: two lists."""
        counted = [MatrixSparsity(self.layer, name, shape, count)
                   for (name, shape), count in zip(self.shapes.items(), self.zeros.tolist(), strict=True)]
        return counted[:self.nlinears], counted[self.nlinears:]


def measure_sparsity(model, family):
    """Count the zeros of every linear of every decoder layer, on the host. Returns a list of `MatrixSparsity`."""
    return measure_weights(model, family, torch.device("cpu"))[0]


def measure_weights(model, family, device, counted=None):
    """Count the zeros of the decoder layers on a device. Returns lists of `MatrixSparsity`, as `LayerSparsity.read`.

    counted: {index: LayerSparsity} of layers that need not be read again.
    """
    layers, counted = family.layers_of(model), dict(counted or {})
    missing = [index for index in range(len(layers)) if index not in counted]
    for index, after in itertools.pairwise([*missing, len(layers)]):
        with on_device([layers[index]], device):
            prefetch(layers, after, device)
            counted[index] = count_zeros(index, layers[index])
    matrices, others = zip(*(counted[index].read() for index in range(len(layers))), strict=True)
    return sum(matrices, []), sum(others, [])


@torch.no_grad()
def count_zeros(index, layer):
    """Count the zeros of the weights of a decoder layer on its device, for which the host does not wait."""
    weights = {name: module.weight for name, module in linears(layer).items()}
    nlinears = len(weights)
    weights |= other_weights(layer)
    zeros = [weight.numel() - torch.count_nonzero(weight) for weight in weights.values()]
    return LayerSparsity(index, {name: tuple(weight.shape) for name, weight in weights.items()}, nlinears,
                         torch.stack(zeros) if zeros else torch.zeros(0))


def total_sparsity(matrices):
    """Return the fraction of zeros in a list of `MatrixSparsity`."""
    return sum(matrix.zeros for matrix in matrices) / sum(matrix.numel for matrix in matrices)
