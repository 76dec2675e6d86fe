"""Check the threshold for all matrices against sorting all weights, on a model's own statistics."""

import pytest
import torch
from conftest import CPU, inputs_of, make, modules_of

from mixgpt.allocation.fisher import Gradients
from mixgpt.allocation.plan import Budget, by_threshold, inverse_diagonals
from mixgpt.pruning.targets import Target, select
from modelutils import StreamedModel


@pytest.fixture(params=["llama", "opt"])
def statistics(request, tokens):
    model = make(request.param)
    selected = select(model)
    generator = torch.Generator().manual_seed(0)
    gradients = {key: torch.rand(out, generator=generator) for key, (out, _) in selected.items()}
    return model, selected, gradients


def diagonals_of(model, selected, tokens, batch_size=2):
    return inverse_diagonals(StreamedModel(model, CPU, batch_size), list(selected), tokens, 0.01)


def test_inverse_diagonals_are_those_of_the_dense_models_inputs(statistics, tokens):
    model, selected, _ = statistics
    diagonals = diagonals_of(model, selected, tokens)
    for key, X in inputs_of(model, modules_of(model), tokens).items():
        H = 2 / len(X) * X.double().T @ X.double()
        H.diagonal().add_(0.01 * H.diagonal().mean())
        torch.testing.assert_close(diagonals[key].double(), H.inverse().diagonal(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("sparsity", [0.31, 0.5, 0.7])
def test_one_threshold_removes_the_least_scores_of_all(statistics, tokens, sparsity):
    model, selected, gradients = statistics
    diagonals = diagonals_of(model, selected, tokens)
    plan = by_threshold(Budget(selected, Target(sparsity), 1.0, gradients=Gradients(gradients, {}, diagonals),
                               streamed=StreamedModel(model, CPU, 2)))
    scores = {key: module.weight.detach() ** 2 * gradients[key][:, None] / diagonals[key]
              for key, module in modules_of(model).items()}
    total = sum(map(torch.numel, scores.values()))
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort().values[round(sparsity * total) - 1]
    counts = {key: round(plan[key].sparsity * s.numel()) for key, s in scores.items()}
    assert counts == {key: int((s <= threshold).sum()) for key, s in scores.items()}
    assert sum(counts.values()) == round(sparsity * total)
    assert len(set(counts.values())) > len(counts) / 2
