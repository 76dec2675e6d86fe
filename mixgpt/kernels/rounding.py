"""Functions that round weights to grids, which the walks over columns also take apart to compile them."""

from typing import NamedTuple

import torch
from torch import Tensor


class UniformGrid(NamedTuple):
    """A function that rounds W to a multiple of scale, between low and high times it, as computed in `dtype`."""

    scale: Tensor  # (out,), like low and high.
    low: Tensor
    high: Tensor
    dtype: torch.dtype

    def __call__(self, W: Tensor) -> Tensor:
        """Round W (..., out). Returns W's dtype."""
        return (W / self.scale).round_().clamp_(self.low, self.high).mul_(self.scale).to(self.dtype).to(W.dtype)


class Levels(NamedTuple):
    """A function that rounds W to the nearest of some values."""

    borders: Tensor  # (levels − 1, out), ascending, between the values
    values: Tensor  # (levels, out), ascending

    @classmethod
    def between(cls, values: Tensor) -> "Levels":
        """Return the rounder to values (levels, out)."""
        return cls((values[1:] + values[:-1]) / 2, values.contiguous())

    def __call__(self, W: Tensor) -> Tensor:
        """Round W (..., out)."""
        rounded = self.values[0].expand_as(W)
        for border, value in zip(self.borders, self.values[1:], strict=True):
            rounded = torch.where(W > border, value, rounded)
        return rounded
