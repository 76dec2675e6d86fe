"""Check the threshold for all matrices against sorting all weights, on a model's own statistics."""

import pytest
import torch
from conftest import CPU, inputs_of, make, modules_of

from mixgpt.allocation.plan import Budget, by_threshold
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning.targets import Target, select


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
