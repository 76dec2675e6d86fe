"""Count the zeros of every matrix of a model, and of the weights of its layers that are left dense."""

import math
from dataclasses import dataclass

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


def measure_sparsity(model, family):
    """Count the zeros of every linear of every decoder layer. Returns a list of `MatrixSparsity`."""
    counted = []
    for index, layer in enumerate(family.layers_of(model)):
        with on_device([layer], "cpu"):
            counted += count_zeros(index, layer)
    return counted


def measure_others(model, family):
    """Count the zeros of all other weights of the decoder layers, see `other_weights`. Returns `MatrixSparsity`."""
    counted = []
    for index, layer in enumerate(family.layers_of(model)):
        if other_weights(layer):
            with on_device([layer], "cpu"):
                counted += [MatrixSparsity(index, name, tuple(weight.shape), int((weight == 0).sum()))
                            for name, weight in other_weights(layer).items()]
    return counted


def count_zeros(index, layer):
    """Count the zeros of every linear of a decoder layer that is on a device. Returns a list of `MatrixSparsity`."""
    return [MatrixSparsity(index, name, tuple(module.weight.shape), int((module.weight == 0).sum()))
            for name, module in linears(layer).items()]


def total_sparsity(matrices):
    """Return the fraction of zeros in a list of `MatrixSparsity`."""
    return sum(matrix.zeros for matrix in matrices) / sum(matrix.numel for matrix in matrices)
