"""Divide a sparsity budget among matrices by sensitivity: MixGPT (arXiv 2310.09499), algorithm 1."""

import torch


def allocate(sensitivities, sizes, sparsity, alpha):
    """Give each unit a sparsity that falls linearly with its sensitivity rank, on an exact budget.

    sensitivities, sizes (weights): one number per unit, a matrix or a layer. First, the most sensitive unit gets
    sparsity − alpha and the least sensitive sparsity + alpha (the paper's keep-ratios). As units differ in size, a
    common shift, clipped to [0, 1], then makes the weighted mean equal `sparsity`. Ties: the earlier unit ranks as less
    sensitive. Returns a list of floats.
    """
    sizes = torch.tensor(sizes, dtype=torch.float64)
    ideal = sparsity + alpha * (1 - 2 * _rank_fractions(sensitivities))
    low, high = -2.0, 2.0  # ideal lies within [−1, 2]: these shifts clip every unit to 0 or 1
    for _ in range(100):
        shift = (low + high) / 2
        total = ((ideal + shift).clamp(0, 1) * sizes).sum() / sizes.sum()
        low, high = (shift, high) if total < sparsity else (low, shift)
    return (ideal + high).clamp(0, 1).tolist()


def meet_total(sparsities, sizes, total):
    """Move units by one weight where needed, so that the units' rounded numbers of pruned weights sum to `total`.

    sparsities: floats whose mean, weighted by sizes, lies within half a weight of total. The units whose exact number
    is closest to the next whole one move, the first of equally close ones (Hamilton's method of largest remainders).
    Returns a list of floats; those of all other units are unchanged.
    """
    exact = [sparsity * size for sparsity, size in zip(sparsities, sizes, strict=True)]
    missing = total - sum(map(round, exact))
    step = 1 if missing > 0 else -1
    closest = sorted(range(len(exact)), key=lambda i: step * (round(exact[i]) - exact[i]))
    moved = set(closest[:abs(missing)])
    return [(round(exact[i]) + step) / sizes[i] if i in moved else sparsity for i, sparsity in enumerate(sparsities)]


def allocate_whole(sensitivities, sizes, sparsity, alpha, m):
    """Give each unit an integer n of n:m, as `allocate` would, with the total as close to the budget as possible.

    Returns a list of ints in [0, m], none higher for a more sensitive unit.
    """
    sizes = torch.tensor(sizes, dtype=torch.float64)
    ideal = m * torch.tensor(allocate(sensitivities, sizes.tolist(), sparsity, alpha), dtype=torch.float64)
    # n changes where ideal + shift crosses a half-integer: try the midpoint of every interval in between
    steps = (torch.arange(m) + 0.5 - ideal[:, None]).flatten().unique()
    shifts = torch.cat([torch.zeros(1, dtype=torch.float64), (steps[1:] + steps[:-1]) / 2])
    n = (ideal + shifts[:, None] + 0.5).floor().clamp(0, m)  # (shifts, units)
    miss = ((n * sizes).sum(dim=1) / sizes.sum() / m - sparsity).abs()
    best = miss.min()
    closest = [i for i in range(len(shifts)) if miss[i] <= best + 1e-12]
    return n[min(closest, key=lambda i: shifts[i].abs().item())].int().tolist()


def _rank_fractions(sensitivities):
    """Return rank / (units − 1), 0 for the least sensitive unit."""
    ranks = torch.empty(len(sensitivities), dtype=torch.float64)
    order = sorted(range(len(sensitivities)), key=lambda i: sensitivities[i])
    ranks[order] = torch.arange(len(order), dtype=torch.float64)
    return ranks / max(len(order) - 1, 1)


def threshold_counts(scores, least, most, total):
    """Count how many weights of each unit one common threshold removes, exactly `total` of all.

    scores: function that yields (unit index, non-negative float32 scores of all its weights, on any device), the same
    on both of two calls. least, most: lists of ints, the fewest and the most weights that a unit may lose; total lies
    between their sums. Ties at the threshold are removed from the first units. Returns a list of ints.

    Non-negative floats sort like their bit patterns: a radix select, one pass for the threshold's upper 16 bits and one
    for the lower.
    """
    least, most = torch.tensor(least)[:, None], torch.tensor(most)[:, None]
    below, prefix = torch.zeros(len(least), 1, dtype=torch.int64), 0
    for shift in (16, 0):
        counts = torch.zeros(len(least), 1 << 16, dtype=torch.int64)
        for unit, values in scores():
            bits = values.flatten().view(torch.int32)
            if not shift:
                bits = bits[bits >> 16 == prefix]
            counts[unit] += torch.bincount(bits >> shift & 0xFFFF, minlength=1 << 16).cpu()
        counts.cumsum_(1).add_(below)  # number of scores up to each value of these bits
        digit = int((counts.clamp(least, most).sum(0) >= total).int().argmax())
        reached, below = counts[:, digit:digit + 1], counts[:, digit - 1:digit] if digit else below
        prefix = digit
    reached, below = reached.clamp(least, most).flatten(), below.clamp(least, most).flatten()
    spare = (reached - below).flip(0)
    surplus = int(reached.sum()) - total
    return (reached - (surplus - spare.cumsum(0) + spare).clamp_min(0).minimum(spare).flip(0)).tolist()
