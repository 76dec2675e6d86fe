"""Count the zeros of every matrix of a model."""

from dataclasses import dataclass

from modelutils import linears, on_device


@dataclass(frozen=True)
class MatrixSparsity:
    """Zeros counted in one linear of one decoder layer."""

    layer: int
    name: str
    shape: tuple[int, int]
    zeros: int

    @property
    def numel(self):
        return self.shape[0] * self.shape[1]


def measure_sparsity(model, family):
    """Count the zeros of every linear of every decoder layer. Returns a list of `MatrixSparsity`."""
    counted = []
    for index, layer in enumerate(family.layers_of(model)):
        with on_device([layer], "cpu"):
            counted += count_zeros(index, layer)
    return counted


def count_zeros(index, layer):
    """Count the zeros of every linear of a decoder layer that is on a device. Returns a list of `MatrixSparsity`."""
    return [MatrixSparsity(index, name, tuple(module.weight.shape), int((module.weight == 0).sum()))
            for name, module in linears(layer).items()]


def total_sparsity(matrices):
    """Return the fraction of zeros in a list of `MatrixSparsity`."""
    return sum(matrix.zeros for matrix in matrices) / sum(matrix.numel for matrix in matrices)
