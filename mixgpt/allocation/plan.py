"""Give each matrix a target sparsity: the overall one, by the rank of its sensitivity, or by one threshold for all.

By rank: MixGPT (arXiv 2310.09499), algorithm 1. By threshold: removing w_rc from the dense model adds about
w_rc² G_r E[x_c²] to the loss L, where y = W x are a matrix's outputs and G_r = E[(∂L/∂y_r)²]. That is optimal brain
damage (LeCun et al., 1989) with the Fisher matrix of a row approximated by G_r E[x xᵀ]. What gets a sparsity of its
own, a matrix or a layer, is called a unit.
"""

import bisect
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mixgpt.modeling.linears import Key, linears
from mixgpt.modeling.placing import in_turn
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning.targets import Target

LOWER = 13  # `threshold_counts` looks at so many bits of a score in its second pass.


@dataclass(frozen=True)
class Budget:
    """Input of an allocation, which returns {(layer, name): Target}."""

    selected: dict[Key, tuple[int, int]]  # (out, in) of the matrices to prune.
    target: Target  # The overall target.
    alpha: float = 0.0  # A matrix deviates from the overall sparsity at most so far.
    sensitivity: dict[Key, float] | None = None  # Trace per weight of all matrices, if the allocation ranks by it.
    gradients: dict[Key, tuple[Tensor, Tensor]] | None = None  # From `fisher.output_gradients`, if it goes by the loss.
    streamed: StreamedModel | None = None  # The dense model, to run it.
    calibration: Tensor | None = None  # (N, T)


def uniform(budget: Budget) -> dict[Key, Target]:
    """Give every matrix the overall target."""
    return dict.fromkeys(budget.selected, budget.target)


def _by_rank(budget: Budget, unit_of: Callable[[Key], Hashable]) -> dict[Key, Target]:
    """Rank units by the summed sensitivities of their matrices, unit_of((layer, name)); the least become sparsest."""
    sensitivities, sizes, target = {}, {}, budget.target
    weights = {key: out * columns for key, (out, columns) in budget.selected.items()}
    for key, size in weights.items():
        unit = unit_of(key)
        sensitivities[unit] = sensitivities.get(unit, 0) + budget.sensitivity[key]
        sizes[unit] = sizes.get(unit, 0) + size
    arguments = list(sensitivities.values()), list(sizes.values()), target.sparsity, budget.alpha
    if m := target.prunem:
        n_of = dict(zip(sizes, allocate_whole(*arguments, m), strict=True))
        return {key: Target(n_of[unit_of(key)] / m, n_of[unit_of(key)], m) for key in weights}
    sparsity_of = dict(zip(sizes, allocate(*arguments), strict=True))
    sparsities = meet_total([sparsity_of[unit_of(key)] for key in weights], list(weights.values()),
                            round(target.sparsity * sum(weights.values())))
    return {key: Target(sparsity) for key, sparsity in zip(weights, sparsities, strict=True)}


by_matrix = partial(_by_rank, unit_of=lambda key: key)
by_layer = partial(_by_rank, unit_of=lambda key: key[0])


def allocate(sensitivities: Sequence[float], sizes: Sequence[float], sparsity: float, alpha: float) -> list[float]:
    """Give each unit a sparsity that falls linearly with its sensitivity rank, on an exact budget.

    sensitivities, sizes (weights): one number per unit. First, the most sensitive unit gets sparsity − alpha and the
    least sensitive one sparsity + alpha (the paper's keep-ratios). As units differ in size, a common shift, clipped to
    [0, 1], then makes the weighted mean equal `sparsity`. Of equally sensitive units the earlier one is sparser.
    """
    weights = torch.tensor(sizes, dtype=torch.float64)
    ranks = torch.tensor(sensitivities, dtype=torch.float64).argsort(stable=True).argsort().double()
    ideal = sparsity + alpha * (1 - 2 * ranks / max(len(ranks) - 1, 1))
    low, high = -2.0, 2.0  # As ideal lies within [−1, 2], these shifts clip every unit to 0 or 1.
    for _ in range(100):
        shift = (low + high) / 2
        total = ((ideal + shift).clamp(0, 1) * weights).sum() / weights.sum()
        low, high = (shift, high) if total < sparsity else (low, shift)
    return (ideal + high).clamp(0, 1).tolist()


def meet_total(sparsities: Sequence[float], sizes: Sequence[int], total: int) -> list[float]:
    """Move units by one weight where needed, so that the units' rounded numbers of pruned weights sum to `total`.

    sparsities: floats whose mean, weighted by sizes, lies within half a weight of total. The units move whose exact
    number is closest to the next whole one, the first of equally close ones (Hamilton's method of largest remainders).
    """
    exact = [sparsity * size for sparsity, size in zip(sparsities, sizes, strict=True)]
    missing = total - sum(map(round, exact))
    step = 1 if missing > 0 else -1
    closest = sorted(range(len(exact)), key=lambda i: step * (round(exact[i]) - exact[i]))
    moved = set(closest[:abs(missing)])
    return [(round(exact[i]) + step) / sizes[i] if i in moved else sparsity for i, sparsity in enumerate(sparsities)]


def allocate_whole(sensitivities: list[float], sizes: list[int], sparsity: float, alpha: float, m: int) -> list[int]:
    """Give each unit an integer n of n:m, as `allocate` would, with the total as close to the budget as possible."""
    weights = torch.tensor(sizes, dtype=torch.float64)
    ideal = m * torch.tensor(allocate(sensitivities, sizes, sparsity, alpha), dtype=torch.float64)
    # A unit's n changes where ideal + shift crosses a half-integer: the midpoints between these shifts are tried.
    steps = (torch.arange(m) + 0.5 - ideal[:, None]).flatten().unique()
    shifts = sorted([0.0, *((steps[1:] + steps[:-1]) / 2).tolist()])

    def whole(shift: float) -> Tensor:
        return (ideal + shift + 0.5).floor().clamp(0, m)

    def excess(shift: float) -> float:
        return ((whole(shift) * weights).sum() / weights.sum() / m - sparsity).item()

    place = bisect.bisect_left(shifts, 0, key=excess)  # The excess rises with the shift.
    closest = shifts[max(place - 1, 0):place + 1]
    return whole(min(closest, key=lambda shift: (round(abs(excess(shift)), 12), abs(shift)))).int().tolist()


@torch.no_grad()
def by_threshold(budget: Budget) -> dict[Key, Target]:
    """Set sparsities by one threshold on w² G_r E[x_c²], clipped to the overall one ± alpha, with exactly its total."""
    streamed, selected, sparsity = budget.streamed, budget.selected, budget.target.sparsity
    sizes, device = [out * columns for out, columns in selected.values()], streamed.device

    def scores() -> Iterator[tuple[int, Tensor]]:
        for index, layer in in_turn(streamed.layers, device):
            modules = linears(layer)
            for unit, key in enumerate(selected):
                if key[0] == index:
                    G, energy = (values.to(device) for values in budget.gradients[key])
                    yield unit, modules[key[1]].weight.float().square().mul_(G[:, None]).mul_(energy)

    # Matrices that are used but have no gradients choose what is attended to, and get the overall sparsity.
    alphas = [budget.alpha if G.any() or not energy.any() else 0 for G, energy in map(budget.gradients.get, selected)]
    least = [int(max(sparsity - alpha, 0) * size) for alpha, size in zip(alphas, sizes, strict=True)]
    most = [math.ceil(min(sparsity + alpha, 1) * size) for alpha, size in zip(alphas, sizes, strict=True)]
    with streamed.clock.part("allocation"):
        counts = threshold_counts(scores, least, most, round(sparsity * sum(sizes)))
    return {key: Target(count / size) for key, count, size in zip(selected, counts, sizes, strict=True)}


def threshold_counts(scores: Callable[[], Iterator[tuple[int, Tensor]]], least: Sequence[int], most: Sequence[int],
                     total: int) -> list[int]:
    """Count how many weights of each unit one common threshold removes, exactly `total` in all.

    scores: yields (unit index, non-negative float32 scores of all its weights), the same in both of two calls. least,
    most: how many weights each unit may lose. Ties at the threshold are removed from the first units.

    Non-negative floats sort like their bit patterns: a radix select, first of the threshold's upper 18 bits, then of
    the lower 13. Where a threshold rises past a score, the unit's count, clamped to its limits, rises by a step. Only
    the sum of all units' steps is kept, as mixtures of experts have tens of thousands of units, and of each unit the
    few scores whose upper bits are the threshold's.
    """
    low, high = torch.tensor(least), torch.tensor(most)
    upper, lower = (torch.zeros(1 << bits, dtype=torch.int64) for bits in (31 - LOWER, LOWER))
    below, inside = torch.zeros_like(low), {}
    for unit, values in scores():
        upper = upper.to(values.device)
        _add_steps(upper, values.flatten().view(torch.int32) >> LOWER, 0, least[unit], most[unit])
    prefix = int((upper.cumsum(0) >= total - sum(least)).int().argmax())
    for unit, values in scores():
        lower, bits = lower.to(values.device), values.flatten().view(torch.int32)
        digits, below[unit] = bits >> LOWER, (bits < prefix << LOWER).sum()
        digits = bits[digits == prefix] & (1 << LOWER) - 1
        inside[unit] = _add_steps(lower, digits, int(below[unit]), least[unit], most[unit])
    digit = int((lower.cumsum(0) >= total - below.clamp(low, high).sum().item()).int().argmax())
    reached, below = ((below + torch.tensor([int(number[found(digits, digit)].sum())
                                             for _, (digits, number) in sorted(inside.items())])).clamp(low, high)
                      for found in (torch.le, torch.lt))
    spare = (reached - below).flip(0)
    surplus = int(reached.sum()) - total
    return (reached - (surplus - spare.cumsum(0) + spare).clamp_min(0).minimum(spare).flip(0)).tolist()


def _add_steps(steps: Tensor, digits: Tensor, below: int, least: int, most: int) -> tuple[Tensor, Tensor]:
    """Add to `steps`, at each value of the digits (n,), how far a unit's count, clamped to [least, most], rises there.

    below: how many of the unit's scores come before these. Returns the digits' values and their numbers on the host.
    """
    first = 0 if digits.is_cuda or not len(digits) else int(digits.min())  # The host would wait for a GPU's minimum.
    counts = torch.bincount(digits - first)
    reached = (counts.cumsum(0) + below).clamp_(least, most)
    steps[first:first + len(counts)] += reached.diff(prepend=reached.new_full((1,), min(max(below, least), most)))
    counts = counts.cpu() if len(steps) == 1 << LOWER else counts[:0]
    values = counts.nonzero().flatten()
    return (values + first).short(), counts[values].int()
