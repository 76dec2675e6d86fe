"""Check rotated heads by what the model computes and keeps, and steps by autograd's gradient."""

import copy

import pytest
import torch
from conftest import CPU, _llama, inputs_of, modules_of
from modeling.test_decoders import MODELS, build

from mixgpt.modeling.experts import use_linears
from mixgpt.modeling.linears import linears
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import rotation
from mixgpt.pruning.layerwise import magnitude_prune
from mixgpt.pruning.targets import Target

LEFT = {"codegen", "diffllama", "gemma4_text shared", "mamba", "openai-gpt"}  # without heads, or with others


def share(W, squares, target):
    """Return which share of w² E[x²] is kept of weights W (..., in), with E[x²] (..., in)."""
    counts = W.square() * squares
    if target.prunem:
        return counts.unflatten(-1, (-1, target.prunem)).topk(target.prunem - target.prunen).values.sum() / counts.sum()
    return counts.flatten().sort().values[round(target.sparsity * counts.numel()):].sum() / counts.sum()


def rotate(model, tokens, target):
    streamed = StreamedModel(model, CPU, 2)
    stream = streamed.embed(tokens)
    for index, layer in enumerate(streamed.layers):
        rotation.rotate_heads(layer, index, stream, dict.fromkeys(linears(layer), target), 0)
        stream.advance(layer, index)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_with_rotated_heads_computes_the_same_and_keeps_more(kind, tokens):
    model, target = build(kind), Target(0.5, 2, 4)
    use_linears(model)
    for bias in (weight.data for weight in model.parameters() if weight.dim() == 1 and not weight.any()):
        bias.normal_()
    rotated = copy.deepcopy(model)
    rotate(rotated, tokens, target)
    with torch.no_grad():
        expected, logits = (each(tokens, use_cache=False).logits for each in (model, rotated))
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4 * expected.abs().max())
    before, after = modules_of(model), modules_of(rotated)
    changed = [key for key in before if not torch.equal(before[key].weight, after[key].weight)]
    assert bool(changed) == (kind not in LEFT)
    one, two = (sum(share(modules[key].weight, X.square().mean(0), target) for key, X in inputs_of(
        each, {key: modules[key] for key in changed}, tokens).items()) for each, modules in (
            (model, before), (rotated, after)))
    assert two >= one + 0.01 * len(changed)


@pytest.mark.parametrize("finite", [True, False])
def test_heads_stay_in_a_model_pruned_before_or_if_an_input_is_not_finite(finite, tokens):
    model, target = build("llama"), Target(0.5, 2, 4)
    for module in modules_of(model).values() if finite else ():
        module.weight.data = magnitude_prune(module.weight.data, target)
    model.model.embed_tokens.weight.data[tokens[0, 3]] *= 1 if finite else torch.inf
    rotated = copy.deepcopy(model)
    rotate(rotated, tokens, target)
    assert all(map(torch.equal, model.model.layers.parameters(), rotated.model.layers.parameters()))


@pytest.mark.parametrize("kind, options", [("BitNet", {}), ("Olmo", {"clip_qkv": 100.0})])
def test_heads_stay_where_more_than_rounding_would_change(kind, options, tokens):
    """A norm between values and output projection whose weights are about 1, and values that may be clipped."""
    torch.manual_seed(0)
    model = _llama(kind, **options)
    for name, weight in model.named_parameters():
        if "sub_norm" in name:
            weight.data += 0.02 * torch.randn_like(weight)
    rotated = copy.deepcopy(model)
    rotate(rotated, tokens, Target(0.5, 2, 4))
    assert all(map(torch.equal, model.model.layers.parameters(), rotated.model.layers.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_are_rotated_in_16_bits(dtype, tokens):
    model = build("llama").to(dtype)
    rotated = copy.deepcopy(model)
    rotate(rotated, tokens, Target(0.5, 2, 4))
    assert not any(torch.equal(*(layers.self_attn.v_proj.weight for layers in pair))
                   for pair in zip(model.model.layers, rotated.model.layers, strict=True))


@pytest.mark.parametrize("targets", [(Target(0.5, 2, 4),) * 2, (Target(0.4), Target(0.7))])
def test_a_step_goes_along_the_gradient_of_both_shares(targets, monkeypatch):
    monkeypatch.setattr(rotation, "STEPS", 1)
    monkeypatch.setattr(rotation, "LENGTH", 1e-4)
    W_v, W_o, root = (torch.randn(*size, dtype=torch.float64) for size in ((2, 8, 40), (30, 2, 3, 8), (2, 3, 8, 8)))
    h, C = torch.rand(40, dtype=torch.float64), root @ root.mT
    Q = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1).requires_grad_()
    squares = torch.einsum("kde,kgdf,kfe->kge", Q, C, Q)
    (share(Q.mT @ W_v, h, targets[0]) + share(torch.einsum("okgd,kde->okge", W_o, Q), squares, targets[1])).backward()
    step, gradient = rotation.best_rotation(W_v, W_o, h, C, targets) - Q.detach(), Q.grad - Q.grad.mT
    assert (torch.cosine_similarity(step.flatten(1), gradient.flatten(1)) > 1 - 1e-6).all()
