"""Check the peers of the accuracy benchmarks against brute force, and how their figures are written."""

import pytest
from peers import owl_plan, wanda_mask
from scores import spread
from test_sparsegpt import random

from mixgpt.pruning.targets import Target


@pytest.mark.parametrize("target, counts", [(Target(0.33), {3, 4}), (Target(0.25, 1, 4), {1})])
def test_wanda_takes_the_least_scores_of_each_row_or_group(target, counts):
    W, norms = random(7, 12 if target.prunem else 10), random(12 if target.prunem else 10).abs() + 0.1
    width = target.prunem or 10
    mask = wanda_mask(W, norms, target)
    assert mask.sum() == round(target.sparsity * W.numel())  # 3.3 of each row: some lose 3, some 4
    scores = (W.abs() * norms).view(-1, width).tolist()
    for values, chosen in zip(scores, mask.view(-1, width), strict=True):
        assert chosen.sum().item() in counts
        order = sorted(range(width), key=values.__getitem__)
        assert set(chosen.nonzero().flatten().tolist()) == set(order[:chosen.sum()])


def test_owl_meets_the_budget_and_spares_layers_with_outliers():
    ratios = [0.02, 0.05, 0.01, 0.03]
    equal = {(layer, "a"): (8, 4) for layer in range(4)}
    plan = [owl_plan(equal, ratios, 0.6)[layer, "a"].sparsity for layer in range(4)]
    # by hand: 0.16 · (D − 0.01) / 0.04 = 0.04, 0.16, 0, 0.08, whose mean is 0.07
    assert plan == pytest.approx([0.63, 0.51, 0.67, 0.59])
    sizes = {(layer, "a"): (8, 4 * (layer + 1)) for layer in range(4)}
    unequal = owl_plan(sizes, ratios, 0.6)
    total = sum(unequal[key].sparsity * out * columns for key, (out, columns) in sizes.items())
    assert total == pytest.approx(0.6 * sum(out * columns for out, columns in sizes.values()))
    assert {target.sparsity for target in owl_plan(equal, [0.1] * 4, 0.6).values()} == {0.6}


def test_means_and_standard_deviations_are_written_of_perplexities_beyond_all_numbers_too():
    assert [spread(values) for values in ([1, 2, 4], [3.0], [1.0, float("nan")], [2.0, float("inf")])] == [
        "2.33 ± 1.53", "3.00", "nan ± nan", "inf ± inf"]
