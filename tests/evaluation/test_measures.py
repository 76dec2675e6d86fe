"""Check streamed perplexity against the model's own forward, and measured sparsity against a count."""

import copy

import pytest
import torch
from conftest import CPU, logits, make, measure_sparsity, modules_of
from makebelieve import CUDA, Gpu

from mixgpt.evaluation import measures
from mixgpt.evaluation.measures import Survey
from mixgpt.modeling import running
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.experts import split_experts
from mixgpt.modeling.running import StreamedModel


@pytest.mark.parametrize("batch_size, part", [(1, 2048), (4, 7), (8, 2048)])
def test_streamed_perplexity_is_that_of_the_full_forward(tiny, tokens, batch_size, part, monkeypatch):
    """part: tokens whose logits are in memory at a time. The model's own loss is over all sequences, in float64."""
    model, whole = tiny, copy.deepcopy(tiny).double()
    monkeypatch.setattr(measures, "SLICE", part)
    monkeypatch.setattr(running, "CACHED", 100 * part)
    streamed = measures.perplexities(model, {"": tokens}, batch_size, CPU)[""]
    with torch.no_grad():
        assert streamed == pytest.approx(whole(tokens, labels=tokens, use_cache=False).loss.exp().item(), rel=1e-5)


def test_test_sets_pass_the_layers_together_as_they_do_alone(tokens, monkeypatch):
    """The place of each is chosen by what those that are not embedded yet take together."""
    model, tests, room = make("llama"), {"a": tokens, "b": tokens[:3].flip(1), "c": tokens[:1]}, []
    monkeypatch.setattr(running, "place_for", lambda nbytes, *_: room.append(nbytes) or "host")
    together = measures.perplexities(model, tests, 2, CPU)
    assert room == pytest.approx([count * 24 * 32 * 4 for count in (9, 4, 1)])
    for name, tokens in tests.items():
        assert measures.perplexities(model, {name: tokens}, 2, CPU) == {name: together[name]}


def test_a_survey_is_that_of_the_layers_as_they_are_at_last(tokens):
    """Layers may be missing, or come again when they have changed."""
    model = make("llama")
    layers, survey = layers_of(model), Survey(StreamedModel(model, CPU, 1), tokens)
    for index in (0, 1, 0, 2):
        layers[index].mlp.up_proj.weight.data[index:, 3:] *= torch.rand(29) > 0.5
        survey.take(index, layers[index])
    layers[1].mlp.up_proj.weight.data[:5] = 0  # read at the end
    (matrices, _), found = survey.finish()
    torch.testing.assert_close(found, model(tokens, use_cache=False).logits.detach())
    assert [m.zeros for m in matrices] == [(each.weight == 0).sum() for each in modules_of(model).values()]


def test_likelihoods_of_bfloat16_logits_are_summed_in_a_wider_dtype(tokens):
    model = make("llama").bfloat16()
    likelihoods = logits(model, tokens, 1, CPU)[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(likelihoods.flatten(0, 1), tokens[:, 1:].flatten())
    assert measures.perplexities(model, {"": tokens}, 4, CPU)[""] == pytest.approx(loss.exp().item(), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])  # the latter has routers, which are no linears
def test_zeros_of_all_weights_are_counted_on_a_device(name):
    model = make(name)
    state = model.state_dict()
    split_experts(model)
    for weight in layers_of(model)[1].parameters():
        if weight.dim() > 1:
            weight.data[0] = 0
    with Gpu():
        matrices, others = Survey(StreamedModel(model, CUDA, 1)).finish()[0]
    assert bool(others) == (name == "qwen3-moe")
    assert all(m.zeros == (m.shape[-1] if m.layer == 1 else 0) for m in matrices + others)
    assert matrices == measure_sparsity(model)
    numel = sum(tensor.numel() for key, tensor in state.items() if ".layers." in key and tensor.dim() > 1)
    assert sum(m.numel for m in matrices + others) == numel
