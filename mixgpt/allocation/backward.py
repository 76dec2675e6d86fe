"""Gradients of the loss, one decoder layer at a time: the common part of the Hutchinson and Fisher estimates.

Notation: L = Σ −log p(next token) over the tokens of a sequence; x, y input and output of a layer or linear; g = ∂L/∂y.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from tqdm import tqdm

from mixgpt.common import distributed
from mixgpt.modeling import decoder, experts
from mixgpt.modeling.linears import Key, linears
from mixgpt.modeling.placing import allocate, in_turn
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import needs

SAVED_AFTER = 2e9  # On a CPU, a chunk with so many bytes at layer boundaries takes minutes and is saved at its end.


def chunk_size(streamed: StreamedModel, count: int, T: int, states: int, limit: float = math.inf) -> tuple[int, str]:
    """Return the size and the place of `needs.chunk`, the same size in all processes."""
    size, place, _ = needs.chunk(streamed, count, T, states, limit)
    return min(distributed.all_gather_object(size)), place


class Chunk:
    """Sequences that pass together through all layers and back, with their hidden states at all boundaries so far."""

    def __init__(self, streamed: StreamedModel, matrices: Sequence[Key], tokens: Tensor, place: str, bar: tqdm) -> None:
        model = streamed.model
        self.model, self.layers = model, streamed.layers
        self.tokens, self.matrices, self.device, self.place, self.bar = tokens, matrices, streamed.device, place, bar
        self.dtype = needs.working_dtype(model)
        self.stream = streamed.embed(tokens)
        self.stream.arguments = decoder.cast(self.stream.arguments, self.dtype)
        self.borders = [[self.stream.hidden.to(self.dtype)]]  # Per boundary, (n, T, C) of one kind or two.

    def run(self, forward: Callable, turn: Callable, backward: Callable, vocabulary: Tensor | None = None) -> None:
        """Go forward through all layers and back, in self.dtype, on the batches `rows` of sequences.

        Each function returns hidden states of a batch, (B, T, C) of each kind: forward(layer, index, rows) those after
        a layer; turn(head, rows) those that replace them after the last one, with `head` from hidden states (n, C) to
        logits of the vocabulary; backward(layer, index, rows) those that replace the ones before a layer.
        """
        batches, count = self.stream.batches(), len(self.layers)
        for index, layer in in_turn(self.layers, self.device):
            self.borders.append([allocate(border.shape, self.dtype, self.device, self.place)
                                 for border in self.borders[index]])
            layer = self._converted(layer)
            for rows in batches:
                self._write(index + 1, rows, forward(layer, index, rows))
            self.bar.update(len(self.tokens))
        with self.stream.head(self.model, self.dtype, vocabulary) as head:
            for rows in batches:
                self._write(count, rows, turn(head, rows))
        for place, layer in in_turn(list(self.layers)[::-1], self.device):
            index, layer = count - 1 - place, self._converted(layer)
            for rows in batches:
                self._write(index, rows, backward(layer, index, rows))
            self.borders.pop()
            self.bar.update(len(self.tokens))

    def read(self, index: int, rows: slice) -> list[Tensor]:
        """Return the hidden states of a batch before layer number `index`, (B, T, C) of each kind, on the device."""
        return [border[rows].to(self.device) for border in self.borders[index]]

    def _write(self, index: int, rows: slice, states: Iterable[Tensor]) -> None:
        for border, hidden in zip(self.borders[index], states, strict=True):
            border[rows].copy_(hidden)

    def _converted(self, layer: nn.Module) -> nn.Module:
        """Return a layer that computes in self.dtype: itself, or a copy if that is not the model's dtype."""
        return layer if self.model.dtype == self.dtype else copy.deepcopy(layer).to(self.dtype)

    def matrices_of(self, layer: nn.Module, index: int) -> dict[int, nn.Linear]:
        """Return {column of the result: linear} for a layer's matrices."""
        modules = linears(layer)
        return {column: modules[name] for column, (at, name) in enumerate(self.matrices) if at == index}


def by_sequence(module: nn.Module, rows: Tensor, B: int) -> Tensor:
    """Return a batch's inputs or outputs of a linear as (B, T, C), with zeros for tokens not routed to its expert."""
    if isinstance(module, experts.RoutedLinear):
        return module.scatter_to_batch(rows, B)
    return rows.reshape(B, -1, rows.shape[-1])  # A layer may have flattened its input.
