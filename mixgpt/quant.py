"""Grids for weights, one per output channel or group of columns: even, as in GPTQ (arXiv 2210.17323), or codebooks.

A weight on an even grid is w = scale · (code − zero) with code 0 … 2^wbits − 1; the value 0 is always on it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixgpt.common import distributed
from mixgpt.kernels.rounding import Levels, UniformGrid

# The search tries these ranges, in 32nds of the full range: with one of them the lowest code of a symmetric grid of 2
# to 4 bits is minus the largest weight.
SHRINKS = range(32, 7, -1)
CLOSE = 2e-5  # The tolerance on the sparsity.
# The smallest magnitude of each codebook, as a fraction of the largest, and its curvature. Each lowers the error of
# pruned and dense rows of real models most when it joins those before it.
CODEBOOKS = ((0.09, 1), (0.2, 1), (0.03, 2.5), (0.25, 1), (0.06, 1.5), (0.16, 1.5), (0.09, 2.5), (0.16, 1),
             (0.06, 1), (0.3, 1), (0.06, 3), (0.2, 1.5), (0.12, 2), (0.2, 0.5), (0.12, 1), (0.25, 0.5))
REACHES = range(5, 21)  # A codebook's scale is searched where it reaches so many 20ths of the largest weight.
AT_ONCE = 2**22  # At most so many weights are sorted at a time.


@dataclass(frozen=True)
class Scheme:
    """The quantization scheme of a run: here uniform grids, w = scale · (code − zero).

    Only `fit`, `rounder`, `encode` and `decode` know the values of a grid. Another grid, of the ascending values
    w = scale · decode(code, zero), overrides `fit`, `encode` and `decode`: see docs/extending.md. `zero`, a code, is
    kept with each scale: here it is that of 0. Pruned weights are 0 even where 0 is not on the grid.
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
        errors = torch.stack([self.rounder(s, z, W.dtype)(W.t()).t().sub_(W).square_() @ importance
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

    def rounder(self, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> UniformGrid | Levels:
        """Return a function that rounds W (…, out) to the grids (out,) of its last dimension, as values of `dtype`."""
        if type(self).decode is Scheme.decode:
            return UniformGrid(scale, -zero, 2**self.wbits - 1 - zero, dtype)
        codes = torch.arange(2**self.wbits, dtype=torch.uint8, device=scale.device)[:, None]
        values = self.decode(codes.expand(-1, len(scale)), zero) * scale
        return Levels.between(values.to(dtype).to(scale.dtype))

    def encode(self, units: Tensor, zero: Tensor) -> Tensor:
        """Return the codes, uint8, nearest to weights (out, n) given in units of the scale. zero broadcasts."""
        return (units.round() + zero).clamp(0, 2**self.wbits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, zero: Tensor) -> Tensor:
        """Return the values of codes, in units of the scale, float32. zero broadcasts."""
        return codes.float() - zero


@functools.cache  # Each copy from the host takes time.
@torch.inference_mode(False)
def codebook_magnitudes(wbits: int, device: torch.device) -> Tensor:
    """Return the magnitudes in each codebook, ascending, (codebooks, 2^(wbits − 1)), exact in every dtype."""
    top = 2 ** (wbits - 1) - 1
    return torch.tensor([[a + (1 - a) * math.expm1(c * k / top) / math.expm1(c) for k in range(top + 1)]
                         for a, c in CODEBOOKS[:2**wbits]]).bfloat16().float().to(device, non_blocking=True)


class Codebooks(Scheme):
    """Uneven grids of ± 2^(wbits − 1) magnitudes, without 0: `zero` says which of several a row or group takes.

    Magnitude k = 0 … K is a + (1 − a) (e^(ck/K) − 1) / (e^c − 1), with a and c of CODEBOOKS: large weights are rarer
    than small ones, and pruning leaves none around 0.
    """

    name = "codebook"

    def fit(self, W: Tensor, pruned: Tensor, dtype: torch.dtype,
            importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose the codebook of least error, and with mse its scale; without, the scale is the largest weight."""
        importance = W.new_ones(W.shape[1]) if importance is None else importance
        fits = [self._fit(A.masked_fill(gone, 0), importance)
                for A, gone in zip(*(part.split(max(AT_ONCE // W.shape[1], 1)) for part in (W.abs(), pruned)),
                                   strict=True)]
        scale, zero = (torch.cat(values) for values in zip(*fits, strict=True))
        scale = scale.to(dtype).to(W.dtype)
        return torch.where(scale > 0, scale, 1.0), zero.to(W.dtype)

    def _fit(self, A: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales and codebooks of rows of magnitudes A (rows, n), 0 where pruned.

        Σ h (|w| − q)² over the weights h that are rounded to one q is known from Σ h, Σ h |w| and Σ h |w|², and these
        from cumulative sums in the order of |w|.
        """
        magnitudes = codebook_magnitudes(self.wbits, A.device).to(A.dtype)
        borders = (magnitudes[:, 1:] + magnitudes[:, :-1]) / 2
        A, order = A.sort(1)
        h = importance[order].masked_fill_(A == 0, 0)
        sums = [torch.nn.functional.pad((h * A**power).cumsum(1), (1, 0)) for power in range(3)]  # (rows, n + 1)

        def measure(scale: Tensor) -> tuple[Tensor, Tensor]:
            """Return the errors of scales (rows, codebooks), and the best scales for the same codes."""
            ends = torch.searchsorted(A, (scale[:, :, None] * borders).flatten(1)).view(*scale.shape, borders.shape[1])
            ends = torch.nn.functional.pad(torch.nn.functional.pad(ends, (1, 0)), (0, 1), value=A.shape[1])
            count, first = (part.gather(1, ends.flatten(1)).view(ends.shape).diff(dim=2) for part in sums[:2])
            first, second = (first * magnitudes).sum(2), (count * magnitudes.square()).sum(2)
            return sums[2][:, -1:] - scale * (2 * first - scale * second), first / second

        scale = A[:, -1:].expand(-1, len(magnitudes))
        if self.mse:
            errors, better = map(torch.stack, zip(*(measure(part / 20 * scale) for part in REACHES), strict=True))
            scale = better.gather(0, errors.argmin(0, keepdim=True))[0]
        error = measure(scale)[0]
        best = error.nan_to_num(torch.inf).argmin(1, keepdim=True)
        return scale.gather(1, best)[:, 0], best[:, 0]

    def encode(self, units: Tensor, zero: Tensor) -> Tensor:
        magnitudes, zero, size = codebook_magnitudes(self.wbits, units.device), zero.long(), units.abs()
        above = torch.zeros(units.shape, dtype=torch.uint8, device=units.device)
        for border in ((magnitudes[:, 1:] + magnitudes[:, :-1]) / 2).t():
            above += size > border[zero]
        return torch.where(units < 0, 2 ** (self.wbits - 1) - 1 - above, 2 ** (self.wbits - 1) + above)

    def decode(self, codes: Tensor, zero: Tensor) -> Tensor:
        magnitudes = codebook_magnitudes(self.wbits, codes.device)
        return torch.cat([-magnitudes.flip(1), magnitudes], 1)[zero.long(), codes.long()]


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
        """Return the codes (out, in), uint8, of weights W (out, in); of 0, any one if 0 is not on the grid.

        Raises ValueError if W is not on the grid.
        """
        nearest = self.scheme.encode(W.float() / self.scale.float()[:, self.group], self.zero[:, self.group])
        codes = nearest
        for step in (1, -1):  # bfloat16 rounds an 8-bit weight by up to one step: it may belong to the next code.
            neighbours = (nearest.int() + step).clamp(0, 2**self.scheme.wbits - 1).to(torch.uint8)
            codes = torch.where(self.weights(codes) == W, codes, neighbours)
        if not torch.equal(self.weights(codes).masked_fill_(W == 0, 0), W):
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
    rounded = scheme.rounder(scale, zero, W.dtype)(groups.t()).t().masked_fill(groups == 0, 0)
    grid = Grid(scheme, scale.view(rows, columns // width).to(W.dtype),
                zero.view(rows, columns // width).to(torch.uint8),
                torch.arange(columns, dtype=torch.int32, device=W.device) // width)
    return rounded.view(rows, columns).to(W.dtype) + 0.0, grid  # This turns −0 into 0.
