"""Integer grids for weights, as in GPTQ (arXiv 2210.17323), one per output channel or group of columns.

A weight on its grid is w = scale · (code − zero) with code 0 … 2^wbits − 1; the value 0 is always on the grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixgpt.common import distributed
from mixgpt.kernels.columns import UniformGrid

# The search tries these ranges, in 32nds of the full range: with one of them the lowest code of a symmetric grid of 2
# to 4 bits is minus the largest weight.
SHRINKS = range(32, 7, -1)
CLOSE = 2e-5  # The tolerance on the sparsity.


@dataclass(frozen=True)
class Scheme:
    """The quantization scheme of a run: here uniform grids, w = scale · (code − zero).

    Only `fit`, `rounder`, `encode` and `decode` know the values of a grid. Another grid, of the values
    w = scale · decode(code), overrides `fit`, `encode` and `decode`: see docs/extending.md. `zero` is the code of 0.
    """

    name = "uniform"  # The name in common.choices.GRIDS.

    wbits: int
    groupsize: int = -1  # Columns per grid; −1 stands for the whole row.
    sym: bool = False  # Symmetric grids have their zero point in the middle of the codes.
    mse: bool = False  # Search the range with the least error, instead of covering all weights.

    def fit(self, W: Tensor, pruned: Tensor, dtype: torch.dtype,
            importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose scale and zero for every row of W (out, n); the kept weights of a row share a grid.

        pruned: mask (out, n) of the weights to ignore. dtype: that of the saved weights, to which the scale is rounded.
        Returns scale and zero, (out,) each, in the dtype of W. A grid spans the kept weights and 0; with mse its range
        is shrunk by the fraction in SHRINKS with the least sum of importance · (w − q)². importance: (n,), default 1.
        """
        W = W.masked_fill(pruned, 0)
        low, high = W.amin(1).clamp_max(0), W.amax(1).clamp_min(0)
        if self.sym:
            high = torch.maximum(high, -low)
            low = -high
        if not self.mse:
            return self._spanning(low, high, dtype)
        # A copy from the host would wait for all that a GPU has still to do. These numbers are exact in every dtype.
        shrinks = torch.arange(SHRINKS.start, SHRINKS.stop, SHRINKS.step, dtype=W.dtype, device=W.device)[:, None] / 32
        scale, zero = self._spanning(shrinks * low, shrinks * high, dtype)
        importance = W.new_ones(W.shape[1]) if importance is None else importance
        errors = torch.stack([self.rounder(s[:, None], z[:, None], W.dtype)(W).sub_(W).square_() @ importance
                              for s, z in zip(scale, zero, strict=True)])
        best = errors.argmin(0, keepdim=True)  # The widest of equally good ranges.
        return scale.gather(0, best)[0], zero.gather(0, best)[0]

    def _spanning(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return scale and zero of grids that span low … high."""
        codes = 2**self.wbits - 1
        scale = ((high - low) / codes).to(dtype).to(low.dtype)  # The scale is rounded as it will be saved.
        scale = torch.where(scale > 0, scale, 1.0)  # Without kept weights, any scale will do.
        if self.sym:
            return scale, torch.full_like(scale, 2 ** (self.wbits - 1))
        return scale, (-low / scale).round().clamp(0, codes)

    def rounder(self, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return a function that rounds weights to the grid, as computed in `dtype`. Shapes broadcast."""
        if type(self).encode is Scheme.encode:
            return UniformGrid(scale, -zero, 2**self.wbits - 1 - zero, dtype)
        return lambda W: (self.decode(self.encode(W / scale, zero), zero) * scale).to(dtype).to(W.dtype)

    def encode(self, units: Tensor, zero: Tensor) -> Tensor:
        """Return the codes, uint8, nearest to weights given in units of the scale. zero broadcasts."""
        return (units.round() + zero).clamp(0, 2**self.wbits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, zero: Tensor) -> Tensor:
        """Return the values of codes, in units of the scale, float32. zero broadcasts."""
        return codes.float() - zero


@dataclass(frozen=True)
class Grid:
    """The grids of one matrix (out, in)."""

    scheme: Scheme
    scale: Tensor  # (out, groups), in the dtype of the weights
    zero: Tensor  # (out, groups), uint8
    group: Tensor  # (in,), int32: the group of each column

    def to(self, device: torch.device | str) -> "Grid":
        return replace(self, scale=self.scale.to(device), zero=self.zero.to(device), group=self.group.to(device))

    def gathered(self, rows: int) -> "Grid":
        """Return the grids of all `rows` rows of a matrix; every process has those of its share."""
        scale, zero = distributed.all_gather_shares([self.scale, self.zero], [rows, rows])
        return replace(self, scale=scale, zero=zero)

    def codes(self, W: Tensor) -> Tensor:
        """Return the codes (out, in), uint8, of weights W (out, in). Raises ValueError if W is not on the grid."""
        nearest = self.scheme.encode(W.float() / self.scale.float()[:, self.group], self.zero[:, self.group])
        codes = nearest
        for step in (1, -1):  # bfloat16 rounds an 8-bit weight by up to one step: it may belong to the next code.
            neighbours = (nearest.int() + step).clamp(0, 2**self.scheme.wbits - 1).to(torch.uint8)
            codes = torch.where(self.weights(codes) == W, codes, neighbours)
        if not torch.equal(self.weights(codes), W):
            raise ValueError("the weights do not lie on the grid")
        return codes

    def weights(self, codes: Tensor) -> Tensor:
        """Return the weights (out, in) of codes (out, in), in the dtype of the scale."""
        return self.units(codes) * self.scale[:, self.group]

    def units(self, codes: Tensor) -> Tensor:
        """Return the weights of codes (out, in) in units of the scale, in its dtype."""
        return self.scheme.decode(codes, self.zero[:, self.group]).to(self.scale.dtype)


def meet_sparsities(attempt: Callable[[list[float]], list[tuple]], sparsities: Sequence[float], attempts: int = 4,
                    margin_sigmas: float = 0) -> list[tuple]:
    """Prune less and less until pruning plus rounding to zero meets the requested sparsity of each matrix.

    A secant search per matrix: the sparsity that is reached rises with the one pruned to, with a slope of about 1.
    attempt: called with the sparsities to prune to, at most `attempts` times; returns a list of (W, …). margin_sigmas:
    aim that many standard deviations of the number of weights rounded to zero (about Poisson) below the sparsity, and
    accept anything within as many of that. Returns the last result. If rounding alone exceeds the sparsity, the excess
    remains. With several processes, each W is some of the rows of a matrix.
    """
    requested = pruned = torch.tensor(sparsities, dtype=torch.float64)
    before = None
    for left in reversed(range(attempts)):
        results = attempt(pruned.tolist())
        counts = distributed.total([n for W, *_ in results for n in (W.numel(), W.count_nonzero().item())])
        sizes, kept = torch.tensor(counts, dtype=torch.float64).view(-1, 2).t()
        reached = 1 - kept / sizes
        if before is None:
            margin = margin_sigmas * ((reached - pruned).clamp(min=0) / sizes).sqrt()
            goals = (requested - margin).clamp(min=0)
        miss = reached - goals
        tolerance = (margin + 0.501 / sizes).clamp(min=CLOSE)  # Half a weight is as close as whole ones come.
        if not left or ((miss.abs() <= tolerance) | ((pruned == 0) & (miss > 0))).all():
            break
        slopes = torch.ones_like(pruned)
        if before is not None:
            step = pruned - before[0]
            slopes = torch.where(step == 0, 1.0, ((reached - before[1]) / step).clamp(0.3, 1.0))
        before = pruned, reached
        pruned = (pruned - miss / slopes).clamp(min=0)
    return results


def quantize_nearest(W: Tensor, scheme: Scheme) -> tuple[Tensor, Grid]:
    """Round every weight of W (out, in) to the nearest grid value; 0 stays 0. Returns the new W and its `Grid`."""
    rows, columns = W.shape
    width = columns if scheme.groupsize == -1 else scheme.groupsize
    groups = W.float().reshape(-1, width)  # (out · groups, width)
    scale, zero = scheme.fit(groups, groups == 0, W.dtype)
    rounded = scheme.rounder(scale[:, None], zero[:, None], W.dtype)(groups)
    grid = Grid(scheme, scale.view(rows, columns // width).to(W.dtype),
                zero.view(rows, columns // width).to(torch.uint8),
                torch.arange(columns, dtype=torch.int32, device=W.device) // width)
    return rounded.view(rows, columns).to(W.dtype) + 0.0, grid  # This turns −0 into 0.
