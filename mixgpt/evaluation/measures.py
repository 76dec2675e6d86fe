"""Measure perplexity and logits, one decoder layer at a time, and count the zeros of a model's weights."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixgpt.checkpoints.sparse import SparseLinear
from mixgpt.common import distributed
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.linears import linears, other_weights
from mixgpt.modeling.placing import in_turn
from mixgpt.modeling.running import SLICE, HiddenStates, StreamedModel, by_rows


@torch.no_grad()
def perplexities(model: PreTrainedModel, tests: dict[str, Tensor], batch_size: int, device: torch.device,
                 observe: Callable[[int, nn.Module], object] | None = None,
                 behind: Callable[[str, Callable, HiddenStates], object] | None = None) -> dict[str, float]:
    """Return exp of the mean negative log-likelihood of test sets, {name: tokens (N, T)}, each sequence independently.

    T − 1 tokens of each sequence are predicted, as in SparseGPT and GPTQ, with float32 log-likelihoods. All sets pass
    through a layer before the next one is read. observe: called with (index, layer) behind each, if there are tokens.
    behind: called with the name, the head and the `HiddenStates` behind the last layer of each set.
    """
    streamed, streams, totals = StreamedModel(model, device, batch_size), {}, dict.fromkeys(tests, 0.0)
    shares = {name: tokens[distributed.share(len(tokens))] for name, tokens in tests.items()}
    for name, tokens in shares.items():
        if len(tokens):  # There must be room for the sets that follow, too.
            left = sum(shares[other].numel() for other in shares if other not in streams)
            streams[name] = streamed.embed(tokens, left / tokens.numel())
    if streams:
        for index, layer in in_turn(layers_of(model), device, "perplexity"):
            for stream in streams.values():
                stream.advance(layer, index)
            if observe:
                observe(index, layer)
        with stream.head(model) as head:
            for name, stream in streams.items():
                totals[name] = negative_log_likelihood(head, stream, shares[name])
                if behind:
                    behind(name, head, stream)
    totals = distributed.all_gather_object(totals)
    means = {name: sum(each[name] for each in totals) / tokens[:, 1:].numel() for name, tokens in tests.items()}
    return {name: math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan  # exp overflows above 709.
            for name, mean in means.items()}


def negative_log_likelihood(head: Callable, stream: HiddenStates, tokens: Tensor) -> float:
    """Return the negative log-likelihood of tokens (N, T), summed, from the hidden states behind the last layer."""
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for rows in stream.batches():
        hidden = stream.hidden[rows, :-1].to(stream.device).flatten(0, 1)  # (B·(T−1), C)
        labels = tokens[rows, 1:].to(stream.device).flatten()
        for h, label in zip(hidden.split(SLICE), labels.split(SLICE), strict=True):
            for scores, t in by_rows(head(h), label):
                total += nn.functional.cross_entropy(scores.float(), t, reduction="sum")
            del scores  # It holds the logits of this slice, and the next one's need the room.
    return total.item()


@dataclass(frozen=True)
class MatrixSparsity:
    """Zeros counted in one linear of one decoder layer, or in other weights of it."""

    layer: int
    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int


Counts = list[MatrixSparsity]


class Survey:
    """The zeros of a StreamedModel, and the logits of a few tokens, taken while its layers are on the device."""

    def __init__(self, streamed: StreamedModel, tokens: Tensor | None = None) -> None:
        self.streamed, self.tokens, self.counts = streamed, tokens, []
        self.embedded = None if tokens is None else streamed.embed(tokens)

    @torch.no_grad()
    def take(self, index: int, layer: nn.Module) -> list[Counts]:
        """Take layer `index` if it is the next one; 0 starts anew. Returns zeros of its linears and `other_weights`."""
        if index == 0:
            self.counts, self.stream = [], self.embedded and self.embedded.copy()
        found = linears(layer)
        in_linears = {name: module.weight if name in found else module.weight.expand()
                      for name, module in layer.named_modules() if name in found or isinstance(module, SparseLinear)}
        kinds = in_linears, other_weights(layer)
        zeros = iter(torch.stack([(weight == 0).sum() for weights in kinds for weight in weights.values()]).tolist())
        counted = [[MatrixSparsity(index, name, tuple(weight.shape), weight.numel(), next(zeros))
                    for name, weight in weights.items()] for weights in kinds]
        if index == len(self.counts):
            self.counts.append(counted)
            if self.stream:
                self.stream.advance(layer, index)
        return counted

    @torch.no_grad()
    def finish(self) -> tuple[list[Counts], Tensor | None]:
        """Read the layers that are left. Returns all that `take` gives, and logits (N, T, vocabulary) on the host."""
        first, device = len(self.counts), self.streamed.device
        for place, layer in in_turn(self.streamed.layers[first:], device):
            self.take(first + place, layer)
        zeros = [sum(kind, []) for kind in zip(*self.counts, strict=True)]
        if not self.stream:
            return zeros, None
        with self.stream.head(self.streamed.model) as head:
            parts = [head(h.to(device)).to("cpu") for h in self.stream.hidden.flatten(0, 1).split(SLICE)]
        return zeros, torch.cat(parts).unflatten(0, self.tokens.shape)


def total_sparsity(matrices: Iterable[MatrixSparsity]) -> float:
    """Return the fraction of zeros in a list of `MatrixSparsity`."""
    return sum(matrix.zeros for matrix in matrices) / sum(matrix.numel for matrix in matrices)
