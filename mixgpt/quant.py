"""Integer grids for weights, as in GPTQ (arXiv 2210.17323), one per output channel or group of columns.

A weight on its grid is w = scale · (code − zero) with code 0 … 2^wbits − 1; the value 0 is always on the grid.
"""

from dataclasses import dataclass, replace

import torch

from mixgpt.common import distributed
from mixgpt.kernels.columns import UniformGrid

# ranges tried by the search, in 32nds of the full range: with one of them the lowest code of a symmetric grid of 2 to
# 4 bits is minus the largest weight
SHRINKS = range(32, 7, -1)
CLOSE = 2e-5  # tolerance on the sparsity


@dataclass(frozen=True)
class Scheme:
    """The quantization scheme of a run: here uniform grids, w = scale · (code − zero).

    All that knows the values of a grid is in `fit`, `rounder`, `encode` and `decode`. Another grid, of the values
    w = scale · decode(code), overrides `fit`, `encode` and `decode`: see docs/extending.md. `zero` is the code of 0.
    """

    name = "uniform"  # in common.choices.GRIDS

    wbits: int
    groupsize: int = -1  # columns per grid, −1: the whole row
    sym: bool = False  # symmetric: zero point in the middle of the codes
    mse: bool = False  # search the range with the least error, instead of covering all weights

    def fit(self, W, pruned, dtype, importance=None):
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
        # made on the device: a copy from the host would wait for all that a GPU has still to do; exact in every dtype
        shrinks = torch.arange(SHRINKS.start, SHRINKS.stop, SHRINKS.step, dtype=W.dtype, device=W.device)[:, None] / 32
        scale, zero = self._spanning(shrinks * low, shrinks * high, dtype)
        importance = W.new_ones(W.shape[1]) if importance is None else importance
        errors = torch.stack([self.rounder(s[:, None], z[:, None], W.dtype)(W).sub_(W).square_() @ importance
                              for s, z in zip(scale, zero, strict=True)])
        best = errors.argmin(0, keepdim=True)  # the widest of equals
        return scale.gather(0, best)[0], zero.gather(0, best)[0]

    def _spanning(self, low, high, dtype):
        codes = 2**self.wbits - 1
        scale = ((high - low) / codes).to(dtype).to(low.dtype)  # as saved
        scale = torch.where(scale > 0, scale, 1.0)  # no kept weights, no range: any scale will do
        if self.sym:
            return scale, torch.full_like(scale, 2 ** (self.wbits - 1))
        return scale, (-low / scale).round().clamp(0, codes)

    def rounder(self, scale, zero, dtype):
        """Return a function that rounds weights to the grid, as computed in `dtype`. Shapes broadcast."""
        if type(self).encode is Scheme.encode:
            return UniformGrid(scale, -zero, 2**self.wbits - 1 - zero, dtype)
        return lambda W: (self.decode(self.encode(W / scale, zero), zero) * scale).to(dtype).to(W.dtype)

    def encode(self, units, zero):
        """Return the codes, uint8, nearest to weights given in units of the scale. zero broadcasts."""
        return (units.round() + zero).clamp(0, 2**self.wbits - 1).to(torch.uint8)

    def decode(self, codes, zero):
        """Return the values of codes, in units of the scale, float32. zero broadcasts."""
        return codes.float() - zero


@dataclass(frozen=True)
class Grid:
    """The grids of one matrix (out, in)."""

    scheme: Scheme
    scale: torch.Tensor  # (out, groups), in the dtype of the weights
    zero: torch.Tensor  # (out, groups), uint8
    group: torch.Tensor  # (in,), int32: group index of each column

    def to(self, device):
        return replace(self, scale=self.scale.to(device), zero=self.zero.to(device), group=self.group.to(device))

    def gathered(self, rows):
        """Return the grids of a matrix of so many rows, of which every process has those of its share of the rows."""
        scale, zero = (distributed.all_gather_shares([of_share], [rows])[0] for of_share in (self.scale, self.zero))
        return replace(self, scale=scale, zero=zero)

    def codes(self, W):
        """Return the codes (out, in), uint8, of weights W (out, in). Raises ValueError if W is not on the grid."""
        nearest = self.scheme.encode(W.float() / self.scale.float()[:, self.group], self.zero[:, self.group])
        codes = nearest
        for step in (1, -1):  # bfloat16 rounds an 8-bit weight by up to one step: it may belong to the next code
            neighbours = (nearest.int() + step).clamp(0, 2**self.scheme.wbits - 1).to(torch.uint8)
            codes = torch.where(self.weights(codes) == W, codes, neighbours)
        if not torch.equal(self.weights(codes), W):
            raise ValueError("the weights do not lie on the grid")
        return codes

    def weights(self, codes):
        """Return the weights (out, in) of codes (out, in), in the dtype of the scale."""
        return self.units(codes) * self.scale[:, self.group]

    def units(self, codes):
        """Return the weights of codes (out, in) in units of the scale, in its dtype."""
        return self.scheme.decode(codes, self.zero[:, self.group]).to(self.scale.dtype)


def meet_sparsities(attempt, sparsities, attempts=4, margin_sigmas=0):
    """Lower the pruning targets until pruning plus rounding to zero meets the requested sparsity of each matrix.

    A secant search per matrix: the sparsity that is reached rises with the target, with a slope of about 1.
    attempt: called with a list of targets, at most `attempts` times; returns a list of (W, …). margin_sigmas: aim that
    many standard deviations of the number of weights rounded to zero (about Poisson) below the sparsity, and accept
    anything within as many of that. Returns the last result. If rounding alone exceeds the sparsity, the excess
    remains. In several processes, each W is some of the rows of a matrix.
    """
    requested = targets = torch.tensor(sparsities, dtype=torch.float64)
    before = None
    for left in reversed(range(attempts)):
        results = attempt(targets.tolist())
        counts = distributed.total([n for W, *_ in results for n in (W.numel(), W.count_nonzero().item())])
        sizes, kept = torch.tensor(counts, dtype=torch.float64).view(-1, 2).t()
        reached = 1 - kept / sizes
        if before is None:
            margin = margin_sigmas * ((reached - targets).clamp(min=0) / sizes).sqrt()
            goals = (requested - margin).clamp(min=0)
        miss = reached - goals
        tolerance = (margin + 0.501 / sizes).clamp(min=CLOSE)  # filled up to a whole weight, W misses by the margin
        if not left or ((miss.abs() <= tolerance) | ((targets == 0) & (miss > 0))).all():
            return results
        slopes = torch.ones_like(targets)
        if before is not None:
            step = targets - before[0]
            slopes = torch.where(step == 0, 1.0, ((reached - before[1]) / step).clamp(0.3, 1.0))
        before = targets, reached
        targets = (targets - miss / slopes).clamp(min=0)


def quantize_nearest(W, scheme):
    """Round every weight of W (out, in) to the nearest grid value; 0 stays 0. Returns the new W and its `Grid`."""
    rows, columns = W.shape
    width = columns if scheme.groupsize == -1 else scheme.groupsize
    groups = W.float().reshape(-1, width)  # (out · groups, width)
    scale, zero = scheme.fit(groups, groups == 0, W.dtype)
    rounded = scheme.rounder(scale[:, None], zero[:, None], W.dtype)(groups)
    grid = Grid(scheme, scale.view(rows, columns // width).to(W.dtype),
                zero.view(rows, columns // width).to(torch.uint8),
                torch.arange(columns, dtype=torch.int32, device=W.device) // width)
    return rounded.view(rows, columns).to(W.dtype) + 0.0, grid  # −0 becomes 0
