"""Check the peers of the accuracy benchmarks against brute force."""

import copy

import pytest
import torch
from conftest import CPU, make, make_plan
from peers import outlier_ratios, owl_plan, wanda, wanda_mask

from mixgpt.evaluation.measures import measure_sparsity, total_sparsity
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Target, select
from modelutils import StreamedModel, linears
from quant import Scheme, quantize_nearest


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def inputs_of(model, family, tokens):
    """Return {(layer, name): inputs (tokens, in)} of one run of the whole model."""
    seen, handles = {}, []
    for index, layer in enumerate(family.layers_of(model)):
        for name, module in linears(layer).items():
            handles.append(module.register_forward_pre_hook(
                lambda _, args, key=(index, name): seen.update({key: args[0].flatten(0, -2)})))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_wanda_takes_the_least_scores_of_each_row():
    W, norms = random(7, 10), random(10).abs() + 0.1
    mask = wanda_mask(W, norms, Target(0.33))
    assert mask.sum() == round(0.33 * W.numel())  # 3.3 of each row: some lose 3, some 4
    for row, chosen in zip(W, mask, strict=True):
        assert chosen.sum() in (3, 4)
        order = sorted(range(10), key=lambda j: abs(row[j].item()) * norms[j].item())
        assert set(chosen.nonzero().flatten().tolist()) == set(order[:chosen.sum()])


def test_wanda_takes_n_of_every_m():
    W, norms = random(5, 12), random(12).abs() + 0.1
    mask = wanda_mask(W, norms, Target(0.25, 1, 4))
    for i in range(5):
        for start in range(0, 12, 4):
            least = min(range(start, start + 4), key=lambda j: abs(W[i, j].item()) * norms[j].item())
            assert mask[i, start:start + 4].nonzero().flatten().tolist() == [least - start]


@pytest.mark.parametrize("scheme", [None, Scheme(4)])
def test_wanda_calibrates_each_layer_on_the_pruned_layers_before(tokens, scheme):
    family, model = make("llama")
    pruned = copy.deepcopy(model)
    prune_layerwise(StreamedModel(pruned, family, CPU, 2), make_plan(select(model, family), Target(0.5)), tokens,
                    Recipe(wanda, scheme=scheme, true_sequential=False))
    for index, layer in enumerate(family.layers_of(model)):
        seen = inputs_of(model, family, tokens)  # whose layers before this one are pruned by now
        for name, module in linears(layer).items():
            W = module.weight.detach()
            W = W.masked_fill(wanda_mask(W, seen[index, name].norm(dim=0), Target(0.5)), 0)
            module.weight.data.copy_(quantize_nearest(W, scheme)[0] if scheme else W)
        for name, module in linears(family.layers_of(pruned)[index]).items():
            # norms in another order of summation may exchange weights of nearly equal score
            assert ((module.weight == 0) == (layer.get_submodule(name).weight == 0)).float().mean() > 0.995
    assert total_sparsity(measure_sparsity(pruned, family)) == pytest.approx(0.5, abs=1e-9 if scheme is None else 0.1)


def test_owl_counts_outliers_over_all_matrices_of_a_dense_layer(tokens):
    family, model = make("llama")
    with torch.no_grad():
        for layer in family.layers_of(model):
            for module in linears(layer).values():
                module.weight[0, :5] *= 20
    seen = inputs_of(model, family, tokens)
    ratios = outlier_ratios(StreamedModel(model, family, CPU, 2), tokens)
    for index, layer in enumerate(family.layers_of(model)):
        A = [(seen[index, name].norm(dim=0) * module.weight.detach().abs()).flatten().tolist()
             for name, module in linears(layer).items()]
        A = [value for values in A for value in values]
        limit = 5 * sum(A) / len(A)
        assert 0 < ratios[index] == pytest.approx(sum(value > limit for value in A) / len(A), abs=1.5 / len(A))


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
    assert sorted(range(4), key=lambda layer: unequal[layer, "a"].sparsity) == [1, 3, 0, 2]
    assert {target.sparsity for target in owl_plan(equal, [0.1] * 4, 0.6).values()} == {0.6}
