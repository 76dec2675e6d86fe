"""Check runs of a layer that pause at linears against plain runs, Hessians of experts, and what memory is counted."""

import io
from functools import partial

import pytest
import torch
from conftest import CPU, VOCABULARY, _llama, inputs_of, make
from makebelieve import CUDA, Gpu
from transformers import MambaConfig, MambaForCausalLM

from mixgpt.common.choices import SOLVERS
from mixgpt.kernels import columns, selection
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.experts import split_experts
from mixgpt.modeling.linears import hooked, linears, shared_inputs
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning.calibration import Calibration, paused_forwards
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.needs import pass_bytes
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Target, select


def test_paused_forwards_are_one_forward_and_stop_with_all_inputs_in_front_of_each_module(tiny, tokens):
    layer = layers_of(tiny)[0]
    whole, paused = (StreamedModel(tiny, CPU, 2).embed(tokens) for _ in range(2))
    stops = [linears(layer)[group[0]] for group in shared_inputs(layer, 0, whole)]
    inputs, expected = {module: [] for module in stops}, {module: [] for module in stops}
    with hooked({module: expected[module].append for module in stops}):
        whole.advance(layer, 0)
    forwards = paused_forwards(layer, 0, paused, stops, lambda module, X: inputs[module].append(X))
    for number, module in enumerate(forwards):
        assert module is stops[number]
        assert [len(inputs[stop]) for stop in stops] == [3] * (number + 1) + [0] * (len(stops) - number - 1)
    assert torch.equal(paused.hidden, whole.hidden)
    assert all(torch.equal(X, Y) for module in stops for X, Y in zip(inputs[module], expected[module], strict=True))


@pytest.mark.parametrize("true_sequential", [False, True])
@torch.no_grad()
def test_the_hessian_of_an_expert_with_few_tokens_is_filled_up_to_one_for_each_column(true_sequential, tokens):
    """By the mean over all tokens that enter the experts, or for down projections by its own mean diagonal."""
    model, tokens = make("qwen3-moe"), tokens[:3, :8]
    split_experts(model)
    mlp = layers_of(model)[0].mlp
    bias = torch.tensor([1e3, 0, -1e3, 0])  # all 24 tokens go to expert 0, whose down_proj has 16 columns; none to 2
    mlp.gate.register_forward_hook(lambda _, args, output: (*output[:2], (output[0] + bias).topk(2).indices))
    hidden = inputs_of(model, {"mlp": mlp}, tokens)["mlp"]
    chosen, counts = (hidden @ mlp.gate.weight.T + bias).topk(2).indices, set()
    plan = {key: Target(0.5) for key in select(model, maxlayer=1, prune_only="experts")}
    calibration = Calibration(StreamedModel(model, CPU, 2), plan, tokens, Recipe(true_sequential=true_sequential))
    for (name, *_), hessian in calibration.inputs(0, layers_of(model)[0], io.StringIO()):
        number = name.split(".")[2]
        X, expert = hidden[(chosen == int(number)).any(1)], mlp.experts.get_submodule(number)
        mean = 2 / 3 * hidden.T @ hidden / 24
        if name.endswith("down_proj"):
            X = torch.nn.functional.silu(X @ expert.gate_proj.weight.T) * (X @ expert.up_proj.weight.T)
            mean = torch.eye(16) * (2 / 3 * X.square().sum(0).mean() / len(X) if len(X) else 1)
        H, (n, columns) = 2 / 3 * X.T @ X, X.shape
        torch.testing.assert_close(hessian.H, H + max(columns - n, 0) * mean, rtol=1e-4, atol=1e-5)
        counts.add((n, columns))
    assert {(24, 32), (24, 16), (0, 32), (0, 16)} < counts


def test_layers_without_attention_are_counted():
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=3))
    assert min(pass_bytes(StreamedModel(model, CPU, 1), select(model), (4, 64), False, False)) > 4 * 64 * 32 * 4


def test_attention_heads_that_differ_between_layers_are_counted():
    model, counted = make("llama"), []
    model.set_attn_implementation("eager")
    for heads in (4, 8):
        model.config.per_layer_config = {1: {"num_attention_heads": heads}}
        counted.append(pass_bytes(StreamedModel(model, CPU, 1), select(model), (4, 64), False, False))
    assert counted[0] < counted[1]


def many_experts():
    """Build a model of which a layer's Hessians take more than its hidden states."""
    model = _llama("Qwen3Moe", hidden_size=128, num_hidden_layers=1, moe_intermediate_size=16, num_experts=24,
                   num_experts_per_tok=2)
    split_experts(model)
    return model


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("build, shape, options", [
    (partial(make, "bloom"), (24, 64), {}), (partial(make, "qwen3-moe"), (24, 64), {}),
    (many_experts, (4, 16), {"target": "dense"}),
    (partial(make, "opt"), (24, 64), {"solver": "admm", "target": "dense"})])
def test_the_bytes_of_one_pass_and_of_two_are_about_those_of_the_peak(build, shape, options, true_sequential,
                                                                      monkeypatch):
    monkeypatch.setattr(columns, "triton_obstacle", lambda device: "it is make-believe")
    monkeypatch.setattr(selection, "DIGIT", 8)  # else numbers of scores take more memory than so small a model
    model = build()
    split_experts(model)
    tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(SOLVERS[options.get("solver", "obs")].load(), fits_dense="target" in options,
                    true_sequential=true_sequential)
    selected = select(model)
    with Gpu() as gpu:
        streamed = StreamedModel(model, CUDA, 1)
        one, two = pass_bytes(streamed, selected, shape, "target" in options, "solver" in options)
        prune_layerwise(streamed, dict.fromkeys(selected, Target(0.5)), tokens, recipe)
    assert 0.95 * gpu.peak <= (one if true_sequential else two) <= 1.9 * gpu.peak  # memory.USABLE leaves a tenth
