"""Check the division of the sparsity against the paper's algorithm by hand, brute force and sorting all weights."""

import resource
from fractions import Fraction
from itertools import product
from math import ceil, floor

import psutil
import pytest
import torch
from conftest import CPU, inputs_of, make, make_plan, modules_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mixgpt.allocation.plan import Budget, allocate, allocate_whole, by_threshold, meet_total, threshold_counts
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning.targets import Target, select

hypothesis_settings = settings(max_examples=150, deadline=None, derandomize=True, database=None)
budgets = st.floats(0.05, 0.95)
alphas = st.floats(0, 0.3)


@st.composite
def units(draw, most=12, largest=10**8):
    """Draw (sensitivities, sizes) of 1 to `most` units; the sensitivities include negative and equal ones."""
    count = draw(st.integers(1, most))
    sensitivity = draw(st.sampled_from([st.integers(-2, 2), st.integers(-1000, 1000)])).map(float)
    return (draw(st.lists(sensitivity, min_size=count, max_size=count)),
            draw(st.lists(st.integers(1, largest), min_size=count, max_size=count)))


def by_the_paper(sensitivities, p, alpha):
    """Return 1 − keep-ratio, which rises with the rank from 1 − p − alpha to 1 − p + alpha (algorithm 1)."""
    result = [None] * len(sensitivities)
    by_rank = sorted((value, place) for place, value in enumerate(sensitivities))  # of equal ones the first comes first
    for rank, (_, place) in enumerate(by_rank):
        step = Fraction(rank, len(result) - 1) if len(result) > 1 else Fraction(1, 2)
        result[place] = 1 - float(1 - Fraction(p) - Fraction(alpha) + 2 * Fraction(alpha) * step)
    return result


def total(sparsities, sizes):
    """Return the sparsity of all weights together, from exact sums."""
    return float(sum(Fraction(s) * size for s, size in zip(sparsities, sizes, strict=True)) / sum(sizes))


def by_hand(sensitivities, sizes, p, alpha):
    """Return the paper's sparsities moved onto the budget, where none leaves [0, 1]. Takes and returns dicts."""
    keys, values = list(sizes), by_the_paper([sensitivities[key] for key in sizes], p, alpha)
    shift = p - total(values, sizes.values())
    assert all(0 < value + shift < 1 for value in values)
    return {key: value + shift for key, value in zip(keys, values, strict=True)}


@hypothesis_settings
@given(units=units(), p=st.floats(0, 1), alpha=st.floats(0, 1))
def test_one_common_shift_and_clipping_lead_from_the_papers_sparsities_to_the_budget(units, p, alpha):
    sparsities = allocate(*units, p, alpha)
    assert total(sparsities, units[1]) == pytest.approx(p, rel=0, abs=1e-9) and all(0 <= s <= 1 for s in sparsities)
    least, most = -3.0, 3.0  # the shifts that explain every value: any below −s for 0, any above 1 − s for 1
    for s, paper in zip(sparsities, by_the_paper(units[0], p, alpha), strict=True):
        least, most = max(least, s - paper if s > 0 else -3.0), min(most, s - paper if s < 1 else 3.0)
    assert least <= most + 1e-9


@hypothesis_settings
@given(units=units(most=8, largest=60), p=budgets, alpha=alphas)
def test_whole_weights_meet_the_total_and_are_as_close_to_the_exact_numbers_as_any_that_do(units, p, alpha):
    sizes, sparsities = units[1], allocate(*units, p, alpha)
    exact = [sparsity * size for sparsity, size in zip(sparsities, sizes, strict=True)]
    met = meet_total(sparsities, sizes, round(p * sum(sizes)))
    counts = [round(sparsity * size) for sparsity, size in zip(met, sizes, strict=True)]
    assert sum(counts) == round(p * sum(sizes)) and all(0 <= s <= 1 for s in met)
    ways = [way for way in product(*({floor(count), ceil(count)} for count in exact)) if sum(way) == sum(counts)]
    moved = [sum(abs(whole - count) for whole, count in zip(way, exact, strict=True)) for way in (counts, *ways)]
    assert moved[0] == pytest.approx(min(moved), rel=0, abs=1e-6)


def rounded(real, shift, m):
    """Round every value + shift to a whole number in [0, m]."""
    return [min(max(floor(value + shift + 0.5), 0), m) for value in real]


def miss(n, sizes, m, p):
    """Return how far the sparsity of all weights together is from p."""
    return abs(total([Fraction(k, m) for k in n], sizes) - p)


@hypothesis_settings
@given(units=units(most=6, largest=100), p=budgets, alpha=alphas, m=st.sampled_from([2, 4, 8]))
def test_no_common_shift_of_the_real_plan_comes_closer_to_the_budget(units, p, alpha, m):
    n = allocate_whole(*units, p, alpha, m)
    real = [m * s for s in allocate(*units, p, alpha)]
    grid = [m * (2 * (i + 0.4142) / 400 - 1) for i in range(400)]
    assert miss(n, units[1], m, p) <= min(miss(rounded(real, shift, m), units[1], m, p) for shift in grid) + 1e-9


def test_n_of_the_matrices_of_many_experts_takes_no_memory_for_all_pairs_of_them():
    n = allocate_whole(list(range(40_000)), [1] * 40_000, 0.5, 0.3, 4)
    assert sum(n) == 80_000 and n == sorted(n, reverse=True)


def random_sensitivity(model, seed=0):
    """Return a sensitivity for every linear of the model."""
    keys = list(select(model))
    values = torch.randn(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    return dict(zip(keys, values, strict=True))


@pytest.mark.parametrize("way", ["layer-level", "weight-level"])
@pytest.mark.parametrize("selection", [{}, {"minlayer": 1, "prune_only": "self_attn"},
                                       {"minlayer": 1, "prune_only": "fc", "invert": True}])
def test_selected_matrices_are_ranked_on_their_own_budget_and_meet_it_to_the_weight(selection, way):
    """By layer: the sum over the matrices of a layer, which get one sparsity."""
    model = make("opt")
    sensitivity, selected = random_sensitivity(model), select(model, **selection)
    plan = make_plan(selected, Target(0.4), way, sensitivity, 0.15)
    unit_of = {key: key[0] if way == "layer-level" else key for key in selected}
    sums, sizes = dict.fromkeys(unit_of.values(), 0), dict.fromkeys(unit_of.values(), 0)
    for key, (rows, columns) in selected.items():
        sums[unit_of[key]] += sensitivity[key]
        sizes[unit_of[key]] += rows * columns
    expected = by_hand(sums, sizes, 0.4, 0.15)
    for key, (rows, columns) in selected.items():
        assert abs(plan[key].sparsity - expected[unit_of[key]]) * rows * columns < 1
        assert (plan[key].prunen, plan[key].prunem) == (0, 0)
    assert sum(round(plan[key].sparsity * rows * columns) for key, (rows, columns) in selected.items()) == round(
        0.4 * sum(sizes.values()))


def test_n_of_m_gives_every_matrix_a_whole_n_of_the_same_m_by_its_rank():
    model = make("opt")
    selected = select(model, prune_only="self_attn")  # 12 matrices of one size
    sensitivity = random_sensitivity(model)
    plan = make_plan(selected, Target(0.5, 2, 4), "weight-level", sensitivity, 0.3)
    n = rounded([4 * s for s in by_the_paper([sensitivity[key] for key in selected], 0.5, 0.3)], 0, 4)
    assert plan == {key: Target(k / 4, k, 4) for key, k in zip(selected, n, strict=True)}
    assert set(n) == {1, 2, 3} and sum(n) == 24


def test_a_common_threshold_breaks_ties_to_the_weight_and_keeps_to_limits():
    scores = [torch.zeros(10), torch.ones(20), torch.ones(30), torch.full((40,), 2.0)]
    for total, counts in ((0, [0] * 4), (37, [10, 20, 7, 0]), (100, [10, 20, 30, 40])):
        assert threshold_counts(lambda: enumerate(scores), [0] * 4, [10, 20, 30, 40], total) == counts
    assert threshold_counts(lambda: enumerate(scores), [2, 4, 6, 8], [8, 16, 24, 32], 50) == [8, 16, 18, 8]
    assert threshold_counts(lambda: enumerate(scores), [2, 4, 6, 8], [8, 16, 24, 32], 20) == [2, 4, 6, 8]


@pytest.fixture(params=["llama", "opt"])
def statistics(request, tokens):
    model = make(request.param)
    selected = select(model)
    generator = torch.Generator().manual_seed(0)
    gradients = {key: torch.rand(out, generator=generator) for key, (out, _) in selected.items()}
    return model, selected, gradients


@pytest.mark.parametrize("sparsity", [0.31, 0.5, 0.7])
def test_one_threshold_removes_the_least_scores_of_all(statistics, tokens, sparsity):
    model, selected, gradients = statistics
    energies = {key: X.square().mean(0) for key, X in inputs_of(model, modules_of(model), tokens).items()}
    plan = by_threshold(Budget(selected, Target(sparsity), 1.0, streamed=StreamedModel(model, CPU, 2),
                               gradients={key: (gradients[key], energies[key]) for key in selected}))
    scores = {key: module.weight.detach() ** 2 * gradients[key][:, None] * energies[key]
              for key, module in modules_of(model).items()}
    total = sum(map(torch.numel, scores.values()))
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort().values[round(sparsity * total) - 1]
    counts = {key: round(plan[key].sparsity * s.numel()) for key, s in scores.items()}
    assert counts == {key: int((s <= threshold).sum()) for key, s in scores.items()}
    assert sum(counts.values()) == round(sparsity * total)
    assert len(set(counts.values())) > len(counts) / 2


def test_a_matrix_without_gradients_has_the_overall_sparsity_and_an_unused_one_loses_most(statistics):
    model, selected, gradients = statistics
    indexer, unused, *_ = selected
    gradients = {key: (G * (key not in (indexer, unused)), torch.ones(selected[key][1]) * (key != unused))
                 for key, G in gradients.items()}
    plan = by_threshold(Budget(selected, Target(0.4), 0.15, streamed=StreamedModel(model, CPU, 2), gradients=gradients))
    sizes = {key: out * columns for key, (out, columns) in selected.items()}
    assert abs(plan[indexer].sparsity - 0.4) * sizes[indexer] < 1
    assert abs(plan[unused].sparsity - 0.55) * sizes[unused] <= 1
    assert sum(round(plan[key].sparsity * size) for key, size in sizes.items()) == round(0.4 * sum(sizes.values()))


def count_of_experts():
    """Count the weights of 20,000 units up to one threshold, with little more memory than there is already."""
    make, (units, size) = torch.Generator().manual_seed(0), (20_000, 48)
    scores = torch.randn(units, size, generator=make).exp_() * torch.randn(units, 1, generator=make).exp_()
    rows, least, most = scores.unbind(), [size // 4] * units, [3 * size // 4] * units
    before = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (before + 2**29, -1))
    counts = threshold_counts(lambda: enumerate(rows), least, most, units * size // 2)
    low, high = 0.0, float(scores.max())
    for _ in range(60):  # bisect the threshold
        middle = (low + high) / 2
        clamped = (scores <= middle).sum(1).clamp(size // 4, 3 * size // 4)
        low, high = (middle, high) if clamped.sum() < units * size // 2 else (low, middle)
    assert counts == (scores <= high).sum(1).clamp(size // 4, 3 * size // 4).tolist()


@pytest.mark.slow
def test_a_common_threshold_of_thousands_of_experts_takes_little_memory(fork):
    process = fork(count_of_experts)
    process.join()
    assert process.exitcode == 0
