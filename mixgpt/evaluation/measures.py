"""Measure perplexity and logits, one decoder layer at a time, and count the zeros of a model's weights."""

import math
from dataclasses import dataclass

import torch

from mixgpt.checkpoints.sparse import SparseLinear
from mixgpt.common import distributed
from mixgpt.modeling.decoder import layers_of
from modelutils import SLICE, HiddenStates, StreamedModel, by_rows, in_turn, linears, other_weights


@torch.no_grad()
def perplexity(model, tokens, batch_size, device, title="perplexity", step=HiddenStates.advance):
    """Return exp of the mean negative log-likelihood of tokens (N, T), each sequence independently.

    T − 1 tokens of each sequence are predicted, as in SparseGPT and GPTQ. Logits in the model's dtype, log-likelihood
    in float32. step: called with (stream, layer, index) to replace the hidden states by the output of a layer.
    """
    N, T = tokens.shape
    mine, total = tokens[distributed.share(N)], torch.zeros((), dtype=torch.float64, device=device)
    if len(mine):
        stream = StreamedModel(model, device, batch_size).embed(mine)
        for index, layer in in_turn(layers_of(model), device, title):
            step(stream, layer, index)
        with stream.head(model) as head:
            for rows in stream.batches():
                hidden = stream.hidden[rows, :-1].to(device).flatten(0, 1)  # (B·(T−1), C)
                targets = mine[rows, 1:].to(device).flatten()
                for h, target in zip(hidden.split(SLICE), targets.split(SLICE), strict=True):
                    for scores, t in by_rows(head(h), target):
                        total += torch.nn.functional.cross_entropy(scores.float(), t, reduction="sum")
    mean = sum(distributed.all_gather_object(total.item())) / (N * (T - 1))
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan  # exp overflows above 709


@torch.no_grad()
def logits(model, tokens, batch_size, device):
    """Return the logits (N, T, vocabulary) of tokens (N, T) on the host, streamed."""
    stream = StreamedModel(model, device, batch_size).embed(tokens)
    for index, layer in in_turn(layers_of(model), device, "logits"):
        stream.advance(layer, index)
    with stream.head(model) as head:
        return torch.cat([head(hidden.to(device)).to("cpu") for hidden in stream.hidden.flatten(0, 1).split(SLICE)]
                         ).unflatten(0, tokens.shape)


@dataclass(frozen=True)
class MatrixSparsity:
    """Zeros counted in one linear of one decoder layer, or in other weights of it."""

    layer: int
    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int


def measure_weights(model, device):
    """Count the zeros of the decoder layers on a device. Returns the lists of `count_zeros` of all layers."""
    layers = [count_zeros(index, layer) for index, layer in in_turn(layers_of(model), device)]
    return tuple([count for counts in kind for count in counts] for kind in zip(*layers, strict=True))


@torch.no_grad()
def count_zeros(index, layer):
    """Return the `MatrixSparsity` of all linears of a layer on its device, and of its `other_weights`: two lists."""
    dense = linears(layer)
    of_linears = {name: module.weight if name in dense else module.weight.expand()
                  for name, module in layer.named_modules() if name in dense or isinstance(module, SparseLinear)}
    return [[MatrixSparsity(index, name, tuple(weight.shape), weight.numel(), (weight == 0).sum().item())
             for name, weight in weights.items()] for weights in (of_linears, other_weights(layer))]


def total_sparsity(matrices):
    """Return the fraction of zeros in a list of `MatrixSparsity`."""
    return sum(matrix.zeros for matrix in matrices) / sum(matrix.numel for matrix in matrices)
