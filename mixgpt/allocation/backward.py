"""Gradients of the loss, one decoder layer at a time: the common part of the Hutchinson and Fisher estimates.

Notation: L = Σ −log p(next token) over the tokens of a sequence; x, y input and output of a layer or linear; g = ∂L/∂y.
"""

import contextlib
import copy
import math

import torch

from mixgpt.common import distributed, memory
from mixgpt.modeling.arguments import cast
from mixgpt.modeling.experts import RoutedLinear
from mixgpt.modeling.streaming import prefetch
from modelutils import allocate, linears, on_device

HOST = torch.device("cpu")
SAVED_AFTER = 2e9  # bytes of hidden states at layer boundaries: on a CPU such a chunk takes minutes, and is saved then


def chunk_size(streamed, count, T, states, limit=math.inf):
    """Return how many of `count` sequences of T tokens have room in memory at all layer boundaries, at least a batch.

    states: kinds of hidden states per boundary. limit: bytes that these may take. All processes get the same number.
    """
    batch, boundaries = streamed.batch_size, states * (len(streamed.layers) + 1)
    sequence = T * streamed.model.config.hidden_size * working_dtype(streamed.model).itemsize  # bytes at a boundary
    rooms, size = rooms_for(streamed).values(), -(-count // batch) * batch
    while size > batch and (boundaries * size * sequence > limit
                            or boundaries > sum(room // (size * sequence) for room in rooms)):
        size -= batch
    return min(distributed.all_gather_object(size))


def rooms_for(streamed):
    """Return {place: bytes that hidden states at layer boundaries may take there}: half of what is free.

    The other half is for the work.
    """
    if streamed.device.type != "cuda":
        return {"host": memory.free(HOST) // 2}
    return {"device": 0 if streamed.on_host else memory.free(streamed.device) // 2,
            "host": memory.free(HOST) // 4}  # PyTorch rounds pinned memory up to a power of two


def working_dtype(model):
    """Return the dtype in which gradients are computed: the model's, but gradients underflow in float16."""
    return torch.float32 if model.dtype == torch.float16 else model.dtype


class Chunk:
    """Sequences that run through all layers together and back, and their hidden states at all layer boundaries.

    Those on the host are in pinned memory, from and to which a GPU copies while it computes.
    """

    def __init__(self, streamed, matrices, tokens, bar):
        model = streamed.model
        self.model, self.family, self.layers = model, streamed.family, streamed.layers
        self.tokens, self.matrices, self.device, self.bar = tokens, matrices, streamed.device, bar
        self.dtype = working_dtype(model)
        self.stream = streamed.embed(tokens)
        self.stream.arguments = cast(self.stream.arguments, self.dtype)
        self.borders = [self.stream.hidden.to(self.dtype)]
        self._rooms = rooms_for(streamed)

    def new_border(self):
        """Return uninitialised memory for the hidden states at a layer boundary, where there is room, else on disk."""
        shape, nbytes = self.borders[0].shape, self.borders[0].nbytes
        place = next((place for place, room in self._rooms.items() if nbytes <= room), "disk")
        if place == "disk":
            return allocate(shape, self.dtype, self.device, place)
        self._rooms[place] -= nbytes
        on_host = place == "host"
        return torch.empty(shape, dtype=self.dtype, device=HOST if on_host else self.device,
                           pin_memory=on_host and self.device.type == "cuda")

    def read(self, border, rows):
        """Return the hidden states of a batch at a layer boundary (B, T, C), on the device."""
        return border[rows].to(self.device, non_blocking=True)

    def write(self, border, rows, hidden):
        """Overwrite the hidden states of a batch at a layer boundary."""
        border[rows].copy_(hidden, non_blocking=True)

    def visit_layers(self, step, backward=False):
        """Call step(layer, index) with each layer, last to first if backward, while the next one is read.

        The layer is on the device and in self.dtype, and its weights do not require gradients.
        """
        order = list(enumerate(self.layers))[::-1 if backward else 1]
        layers = [layer for _, layer in order]
        for place, (index, layer) in enumerate(order):
            with on_device([layer], self.device), _constant(layer, self.dtype) as constant:
                prefetch(layers, place + 1, self.device)
                step(constant, index)
            self.bar.update(len(self.tokens))

    def head(self):
        """Within the block, give a function from hidden states (n, C) after the last layer to logits."""
        return self.stream.head(self.model, self.family, self.dtype)

    def matrices_of(self, layer, index):
        """Return {column of the result: linear} for a layer's matrices."""
        modules = linears(layer)
        return {column: modules[name] for column, (at, name) in enumerate(self.matrices) if at == index}


@contextlib.contextmanager
def pinned_memory_freed(device):
    """At the end of the block, give back the pinned memory that nothing uses; PyTorch keeps it otherwise."""
    yield
    if device.type == "cuda" and hasattr(torch.accelerator, "empty_host_cache"):  # PyTorch 2.8 has no such function
        torch.accelerator.empty_host_cache()


def by_sequence(module, rows, B):
    """Return the inputs or outputs of a linear in a batch as (B, T, C), zeros for tokens not routed to its expert."""
    if isinstance(module, RoutedLinear):
        return module.scatter_to_batch(rows, B)
    return rows.reshape(B, -1, rows.shape[-1])  # even if a layer flattens its input


@contextlib.contextmanager
def _constant(layer, dtype):
    """Give a layer in dtype whose weights require no gradients within the block: itself, or a copy in another dtype."""
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors):
        yield copy.deepcopy(layer).to(dtype).requires_grad_(False)
        return
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    layer.requires_grad_(False)
    try:
        yield layer
    finally:
        for weight in weights:
            weight.requires_grad_(True)
