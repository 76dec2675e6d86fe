"""Check streamed perplexity and logits against the model's own forward, and measured sparsity against a count."""

import copy

import pytest
import torch
from conftest import CPU

from mixgpt.evaluation.perplexity import logits, perplexity


@torch.no_grad()
def full_perplexity(model, tokens):
    """Perplexity from the model's own loss over all sequences at once, in float64."""
    return model.double()(tokens, labels=tokens, use_cache=False).loss.exp().item()


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_streamed_perplexity_is_that_of_the_full_forward(tiny, tokens, batch_size):
    family, model = tiny
    streamed = perplexity(model, family, tokens, batch_size, CPU)
    assert streamed == pytest.approx(full_perplexity(copy.deepcopy(model), tokens), rel=1e-5)


def test_every_layer_counts_in_the_perplexity(tiny, tokens):
    family, model = tiny
    before = perplexity(model, family, tokens, 4, CPU)
    for layer in family.layers_of(model):
        weight = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)][-1].weight
        kept = weight.detach().clone()
        weight.data.zero_()
        assert abs(perplexity(model, family, tokens, 4, CPU) / before - 1) > 1e-4
        weight.data.copy_(kept)


def test_logits_computed_in_slices_give_the_same_perplexity(tiny, tokens, monkeypatch):
    family, model = tiny
    monkeypatch.setattr("mixgpt.evaluation.perplexity.SLICE", 7)
    sliced = perplexity(model, family, tokens, 4, CPU)
    assert sliced == pytest.approx(full_perplexity(copy.deepcopy(model), tokens), rel=1e-5)


def test_streamed_logits_are_those_of_the_full_forward(tiny, tokens):
    family, model = tiny
    with torch.no_grad():
        expected = model(tokens).logits
    assert torch.allclose(logits(model, family, tokens, 2, CPU), expected, atol=1e-4)


def test_evaluation_changes_no_weight_and_leaves_no_hook(tiny, tokens):
    family, model = tiny
    before = copy.deepcopy(model.state_dict())
    perplexity(model, family, tokens, 4, CPU)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_perplexity_on_cuda_is_that_of_the_cpu_and_the_model_returns_to_the_host(tiny, tokens):
    family, model = tiny
    expected = perplexity(model, family, tokens, 4, CPU)
    assert perplexity(model, family, tokens, 4, torch.device("cuda")) == pytest.approx(expected, rel=1e-4)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings
