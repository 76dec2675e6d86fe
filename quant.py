"""Integer grids for weights, as GPTQ (arXiv 2210.17323) uses them, one for every output channel or group of columns.

A weight on its grid is w = scale · (code − zero) with code 0 … 2^wbits − 1: zero itself is always on the grid.
"""

from dataclasses import dataclass, replace

import torch

SHRINKS = torch.linspace(1, 0.2, 65).tolist()  # ranges that the search tries, as fractions of the largest
CLOSE = 2e-5  # to the sparsity that is asked for


@dataclass(frozen=True)
class Scheme:
    """What grids a run uses."""

    wbits: int
    groupsize: int = -1  # columns of a row that share a grid, −1: all
    sym: bool = False  # zero in the middle of the codes
    mse: bool = False  # search the range with the least squared error, instead of the one that holds all weights


@dataclass(frozen=True)
class Grid:
    """The grids of one matrix (out, in)."""

    scheme: Scheme
    scale: torch.Tensor  # (out, groups), in the dtype of the weights
    zero: torch.Tensor  # (out, groups), uint8
    group: torch.Tensor  # (in,), int32: the group of each column

    def to(self, device):
        return replace(self, scale=self.scale.to(device), zero=self.zero.to(device), group=self.group.to(device))

    def codes(self, W):
        """Return the codes (out, in), uint8, of weights W (out, in). Raises ValueError where W is not on the grid."""
        zero, largest = self.zero[:, self.group], 2**self.scheme.wbits - 1
        steps = (W.float() / self.scale.float()[:, self.group]).round()
        codes = (steps + zero).clamp(0, largest).to(torch.uint8)
        # a weight with 8 bits in bfloat16 is rounded by up to a step: then it may be that of the next code
        beyond = (steps + steps.sign() + zero).clamp(0, largest).to(torch.uint8)
        codes = torch.where(self.weights(codes) == W, codes, beyond)
        if not torch.equal(self.weights(codes), W):
            raise ValueError("the weights do not lie on the grid")
        return codes

    def weights(self, codes):
        """Return the weights (out, in) of codes (out, in), in the dtype of the scale."""
        return (codes.float() - self.zero[:, self.group]).to(self.scale.dtype) * self.scale[:, self.group]


def find_grid(W, pruned, scheme, dtype):
    """Choose scale and zero for every row of W (out, n), whose kept weights share a grid.

    pruned: mask (out, n) of the weights that become 0 and do not count. dtype: of the scale, that of the weights in
    the end. Returns scale and zero, (out,) each in the dtype of W. The range of a grid is that of the kept weights
    and 0; with scheme.mse it is shrunk to the fraction, one of SHRINKS, with the least squared error.
    """
    W = W.masked_fill(pruned, 0)
    low, high = W.amin(1).clamp_max(0), W.amax(1).clamp_min(0)
    if scheme.sym:
        high = torch.maximum(high, -low)
        low = -high
    scale, zero = _fit(low, high, scheme, dtype)
    if scheme.mse:
        least = torch.full_like(scale, torch.inf)
        for shrink in SHRINKS:
            candidate = _fit(shrink * low, shrink * high, scheme, dtype)
            error = (to_grid(W, *(x[:, None] for x in candidate), scheme.wbits, dtype) - W).square().sum(1)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = (torch.where(better, new, old) for new, old in zip(candidate, (scale, zero), strict=True))
    return scale, zero


def _fit(low, high, scheme, dtype):
    codes = 2**scheme.wbits - 1
    scale = ((high - low) / codes).to(dtype).to(low.dtype)  # as it is saved
    scale = torch.where(scale > 0, scale, 1.0)  # a row without weights has no range: any scale does
    if scheme.sym:
        return scale, torch.full_like(scale, 2 ** (scheme.wbits - 1))
    return scale, (-low / scale).round().clamp(0, codes)


def to_grid(W, scale, zero, wbits, dtype):
    """Round W to its grid: scale · (code − zero), as computed in `dtype`. Shapes broadcast; returns W's dtype."""
    return to_multiples(W, scale, -zero, 2**wbits - 1 - zero, dtype)


def to_multiples(W, scale, low, high, dtype):
    """Round W to a multiple of scale, between low and high times it, as computed in `dtype`. Returns W's dtype."""
    return (W / scale).round_().clamp_(low, high).mul_(scale).to(dtype).to(W.dtype)


def meet_sparsities(attempt, sparsities, attempts=4):
    """Prune less by as much as rounding makes 0, so that the shares of zeros in matrices come to `sparsities`.

    attempt: called with sparsities, returns a list of (W, whatever). Called up to `attempts` times, by the secant
    method for each matrix. Returns what it gave last. Where rounding alone makes more zeros, there are more.
    """
    asked, before = list(sparsities), None
    for left in reversed(range(attempts)):
        made = attempt(asked)
        found = [1 - W.count_nonzero().item() / W.numel() for W, _ in made]
        missed = [share - wanted for share, wanted in zip(found, sparsities, strict=True)]
        met = [abs(miss) <= CLOSE or (p == 0 and miss > 0) for miss, p in zip(missed, asked, strict=True)]
        if all(met) or not left:
            return made
        slopes = [1.0] * len(asked) if before is None else [
            min(max((new - old) / (p - q), 0.3), 1.0) if p != q else 1.0
            for new, old, p, q in zip(found, before[1], asked, before[0], strict=True)]
        before = asked, found
        asked = [max(p - miss / slope, 0.0) for p, miss, slope in zip(asked, missed, slopes, strict=True)]


def quantize_nearest(W, scheme):
    """Round every weight of W (out, in) to the nearest value of its grid; 0 stays 0. Returns W's like and a `Grid`."""
    rows, columns = W.shape
    width = columns if scheme.groupsize == -1 else scheme.groupsize
    groups = W.float().reshape(-1, width)  # (out · groups, width)
    scale, zero = find_grid(groups, groups == 0, scheme, W.dtype)
    rounded = to_grid(groups, scale[:, None], zero[:, None], scheme.wbits, W.dtype)
    grid = Grid(scheme, scale.view(rows, -1).to(W.dtype), zero.view(rows, -1).to(torch.uint8),
                torch.arange(columns, dtype=torch.int32, device=W.device) // width)
    return rounded.view(rows, columns).to(W.dtype) + 0.0, grid  # −0 becomes 0
