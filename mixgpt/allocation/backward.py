"""Gradients of the loss, one decoder layer at a time: the common part of the Hutchinson and Fisher estimates.

Notation: L = Σ −log p(next token) over the tokens of a sequence; x, y input and output of a layer or linear; g = ∂L/∂y.
"""

import copy
import random

import torch

from mixgpt.modeling.experts import RoutedLinear
from modelutils import linears, on_device

BORDERS = 2e9  # bytes on the host for the hidden states and tangents of a chunk at all layer boundaries


def chunk_size(execution, T, states):
    """Return how many sequences of T tokens fit in BORDERS with `states` kinds of hidden states per layer boundary."""
    border = states * (len(execution.layers) + 1) * T * execution.model.config.hidden_size * 4
    return max(int(BORDERS / border / execution.batch_size), 1) * execution.batch_size


def seeded(*key, device="cpu"):
    """Return a generator seeded by all of `key`."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def loss_of(logits, target):
    """Return the cross-entropy summed over tokens, in float32 or wider. logits: (n, vocabulary). target: (n,)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum")


class Chunk:
    """Hidden states of a chunk of sequences at all layer boundaries, and differentiable copies of layers."""

    def __init__(self, execution, matrices, tokens, bar):
        model, device = execution.model, execution.device
        self.model, self.family, self.layers = model, execution.family, execution.layers
        # gradients underflow in float16
        self.dtype = torch.float32 if model.dtype == torch.float16 else model.dtype
        self.tokens, self.matrices, self.device, self.bar = tokens, matrices, device, bar
        self.stream = execution.embed(tokens)
        self.stream.arguments = {size: [_cast(arguments, self.dtype) for arguments in layers]
                                 for size, layers in self.stream.arguments.items()}
        self.borders = [self.stream.hidden.to("cpu", self.dtype)]

    def copied(self, module):
        """Copy a module to the device, its weights not requiring gradients."""
        with on_device([module], "cpu"):
            return copy.deepcopy(module).to(self.device, self.dtype).requires_grad_(False)

    def matrices_of(self, layer, index):
        """Return {column of the result: linear} for a layer's matrices."""
        modules = linears(layer)
        return {column: modules[name] for column, (at, name) in enumerate(self.matrices) if at == index}

    def head_gradients(self, gradients):
        """Call gradients(function from hidden states to logits, rows) for every batch; return tensors concatenated."""
        with self.stream.head(self.model, self.family, self.dtype) as head:
            parts = [gradients(head, rows) for rows in self.stream.batches()]
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def by_sequence(module, rows, B):
    """Return the inputs or outputs of a linear in a batch as (B, T, C), zeros for tokens not routed to its expert."""
    if isinstance(module, RoutedLinear):
        return module.spread(rows, B)
    return rows.reshape(B, -1, rows.shape[-1])  # even if a layer flattens its input


def _cast(value, dtype):
    """Convert the floating-point tensors in an argument, or in tuples and dicts of arguments."""
    if isinstance(value, tuple):
        return tuple(_cast(each, dtype) for each in value)
    if isinstance(value, dict):
        return {key: _cast(each, dtype) for key, each in value.items()}
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
