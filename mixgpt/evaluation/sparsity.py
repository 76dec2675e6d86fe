"""Count the zeros of every matrix of a model, and of the weights of its layers that are left dense."""

import itertools
import math
from dataclasses import dataclass

import torch

from mixgpt.modeling.streaming import prefetch
from modelutils import linears, on_device, other_weights


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
