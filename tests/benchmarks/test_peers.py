"""Check the peers of the accuracy benchmarks against brute force."""

import copy

import pytest
import torch
from conftest import CPU, inputs_of, make, make_plan, modules_of
from peers import outlier_ratios, owl_plan, wanda, wanda_mask
from test_sparsegpt import random

from mixgpt.evaluation.measures import measure_sparsity, total_sparsity
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Target, select
from modelutils import StreamedModel
from quant import Scheme, quantize_nearest


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


@pytest.mark.parametrize("scheme", [None, Scheme(4)])
def test_wanda_calibrates_each_layer_on_the_pruned_layers_before(tokens, scheme):
    family, model = make("llama")
    pruned = copy.deepcopy(model)
    prune_layerwise(StreamedModel(pruned, family, CPU, 2), make_plan(select(model, family), Target(0.5)), tokens,
                    Recipe(wanda, scheme=scheme, true_sequential=False))
    modules, found = modules_of(model, family), modules_of(pruned, family)
    for layer in range(3):
        seen = inputs_of(model, modules, tokens)  # whose layers before this one are pruned by now
        for key in (key for key in modules if key[0] == layer):
            W = modules[key].weight.detach()
            W = W.masked_fill(wanda_mask(W, seen[key].norm(dim=0), Target(0.5)), 0)
            modules[key].weight.data.copy_(quantize_nearest(W, scheme)[0] if scheme else W)
            # norms in another order of summation may exchange weights of nearly equal score
            assert ((found[key].weight == 0) == (modules[key].weight == 0)).float().mean() > 0.995
    assert total_sparsity(measure_sparsity(pruned, family)) == pytest.approx(0.5, abs=1e-9 if scheme is None else 0.1)


def test_owl_counts_outliers_over_all_matrices_of_a_dense_layer(tokens):
    family, model = make("llama")
    modules = modules_of(model, family)
    for module in modules.values():
        module.weight.data[0, :5] *= 20
    seen = inputs_of(model, modules, tokens)
    for layer, ratio in enumerate(outlier_ratios(StreamedModel(model, family, CPU, 2), tokens)):
        A = torch.cat([(seen[key].norm(dim=0) * module.weight.abs()).flatten() for key, module in modules.items()
                       if key[0] == layer]).tolist()
        limit = 5 * sum(A) / len(A)
        assert 0 < ratio == pytest.approx(sum(value > limit for value in A) / len(A), abs=1.5 / len(A))


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
