"""Check distillation against the model's own full forward, autograd's gradients and a step written with loops."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import CPU, VOCABULARY, make
from makebelieve import CUDA, Gpu
from torch.profiler import ProfilerActivity, profile

from mixgpt.common import distributed, memory
from mixgpt.modeling.experts import split_experts
from mixgpt.pruning import distill as module
from mixgpt.pruning.distill import dense_states, distill, schedule
from mixgpt.pruning.targets import select
from modelutils import StreamedModel, linears
from quant import Scheme, quantize_nearest

N, T = 5, 9


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(module, "STEP_TOKENS", 1)


def halved(family, model):
    """Return a copy of a model of which a random half of the chosen matrices' weights is zero, and what was chosen."""
    pruned, chosen = copy.deepcopy(model), dict.fromkeys(select(model, family))
    generator = torch.Generator().manual_seed(3)
    for index, name in chosen:
        weight = linears(family.layers_of(pruned)[index])[name].weight.data
        weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    return pruned, chosen


@pytest.fixture(params=["opt", "baichuan-13b", "gemma4", "qwen3-moe"])
def case(request):
    """Give (family, dense model, pruned model, chosen matrices, tokens, dense hidden states), in float64."""
    family, model = make(request.param)
    split_experts(model)
    model.double()
    pruned, chosen = halved(family, model)
    tokens = torch.randint(0, VOCABULARY, (N, T), generator=torch.Generator().manual_seed(1))
    return family, model, pruned, chosen, tokens, dense_states(StreamedModel(model, family, CPU, 2), tokens)


SCHEMES = {"rows": Scheme(3), "groups": Scheme(4, groupsize=8, sym=True)}


def quantized(family, model, scheme):
    """Return a copy of a model with half of its weights zero and the others on grids, and {(layer, name): Grid}.

    Grids have no float64: the model becomes one of float32.
    """
    pruned, chosen = halved(family, model.float() if model.dtype == torch.float64 else model)
    for index, name in chosen:
        module = linears(family.layers_of(pruned)[index])[name]
        module.weight.data, chosen[index, name] = quantize_nearest(module.weight.data, scheme)
    return pruned, chosen


def divergence(model, pruned, tokens):
    """Return KL(p ‖ q) per token, of predictions by the models' own forwards."""
    with torch.no_grad():
        log_p = model(tokens, use_cache=False).logits.log_softmax(-1)
    log_q = pruned(tokens, use_cache=False).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def test_gradients_are_those_of_the_divergence_from_the_dense_model(case, monkeypatch):
    family, model, pruned, chosen, tokens, dense = case
    found = []

    def keep(state, factor, number):
        found.append(state.weight.grad)
        state.weight.grad = None

    monkeypatch.setattr(module._Weight, "step", keep)
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "CPU_SLICE", 7)  # several parts
    mean = distill(StreamedModel(pruned, family, CPU, 2), chosen, tokens, dense, 0)
    with module._trained(family.layers_of(pruned), chosen) as weights, torch.enable_grad():
        expected = divergence(model, pruned, tokens)
        wanted = torch.autograd.grad(expected * N * T, weights, allow_unused=True)
    assert mean == pytest.approx(expected.item(), rel=1e-5)  # summed in float32
    assert len(found) == len(weights) > len(chosen)
    for weight, gradient, other in zip(weights, found, wanted, strict=True):
        other = torch.zeros_like(weight) if other is None else other  # experts without tokens
        gradient = torch.zeros_like(weight) if gradient is None else gradient
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


def test_kept_weights_norms_and_biases_learn_and_all_else_stays(case, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 40)
    family, model, pruned, chosen, tokens, dense = case
    before = copy.deepcopy(pruned.state_dict())
    start = divergence(model, pruned, tokens).item()
    mean = distill(StreamedModel(pruned, family, CPU, 2), chosen, tokens.repeat(8, 1), dense.repeat(8, 1, 1), 0)
    end = divergence(model, pruned, tokens).item()
    assert end < 0.95 * start and end < mean < start
    trained = {f"{family.path(index, name)}.weight" for index, name in chosen}
    for name, weight in pruned.state_dict().items():
        layer = name.startswith(f"{family.layers}.")
        if name in trained:
            assert torch.equal(weight == 0, before[name] == 0), name
            assert not torch.equal(weight, before[name]) or ".experts." in name, name
        elif layer and weight.dim() == 1 and name.endswith("weight"):
            assert not torch.equal(weight, before[name]), name
        elif not layer or weight.dim() > 1:
            assert torch.equal(weight, before[name]), name
    assert not any(weight.grad is not None for weight in pruned.parameters())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gradients_of_scales_are_those_of_the_divergence(case, scheme, monkeypatch):
    family, model, _, _, tokens, _ = case
    pruned, grids = quantized(family, model, scheme)
    dense = dense_states(StreamedModel(model, family, CPU, 2), tokens)
    weights = {f"{family.path(*key)}.weight": grid for key, grid in grids.items()}
    before = {name: weight.detach().clone() for name, weight in pruned.named_parameters()}
    logarithms = {name: torch.zeros_like(grid.scale, requires_grad=True) for name, grid in weights.items()}
    scaled = {name: before[name] * logarithms[name].exp()[:, grid.group] for name, grid in weights.items()}

    def forward(tokens, **more):
        return torch.func.functional_call(pruned, before | scaled, (tokens,), more)

    wanted = torch.autograd.grad(divergence(model, forward, tokens) * N * T, list(logarithms.values()),
                                 allow_unused=True)
    found = []

    monkeypatch.setattr(module._Adafactor, "step", lambda _, exact, gradient, *more: found.append(gradient.clone()))
    monkeypatch.setattr(module, "STEPS", 1)
    distill(StreamedModel(pruned, family, CPU, 2), grids, tokens, dense, 0)
    for gradient, other in zip(found, wanted, strict=False):  # those of vectors come behind
        other = torch.zeros_like(gradient) if other is None else other  # experts without tokens
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    assert all(torch.equal(weight, before[name]) for name, weight in pruned.named_parameters())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_scales_learn_and_codes_stay(scheme, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 40)
    family, model = make("llama")
    tokens = torch.randint(0, VOCABULARY, (N, T), generator=torch.Generator().manual_seed(1))
    pruned, grids = quantized(family, model, scheme)
    dense = dense_states(StreamedModel(model, family, CPU, 2), tokens)
    before, start = copy.deepcopy(pruned), divergence(model, pruned, tokens).item()
    old = {key: copy.deepcopy(grid) for key, grid in grids.items()}
    distill(StreamedModel(pruned, family, CPU, 2), grids, tokens.repeat(8, 1), dense.repeat(8, 1, 1), 0)
    assert divergence(model, pruned, tokens).item() < 0.97 * start
    for (index, name), grid in grids.items():
        weight, was = (linears(family.layers_of(each)[index])[name].weight.data for each in (pruned, before))
        codes = grid.codes(weight)  # raises what is not on the grid
        assert torch.equal(codes, old[index, name].codes(was))
        assert torch.equal(grid.weights(codes), weight) and torch.equal(weight == 0, was == 0)
        assert torch.equal(grid.zero, old[index, name].zero) and (grid.scale > 0).all()
        assert (grid.scale != old[index, name].scale).double().mean() > 0.5  # some units are dead


def test_bfloat16_weights_of_8_bits_stay_on_their_grids():
    family, model = make("llama")
    model.to(torch.bfloat16)
    tokens = torch.randint(0, VOCABULARY, (2, T))
    dense = dense_states(StreamedModel(model, family, CPU, 2), tokens)
    pruned, grids = quantized(family, model, Scheme(8))
    distill(StreamedModel(pruned, family, CPU, 2), grids, tokens, dense, 0)
    for (index, name), grid in grids.items():
        weight = linears(family.layers_of(pruned)[index])[name].weight.data
        assert torch.equal(grid.weights(grid.codes(weight)), weight)


def test_a_step_of_scales_is_that_of_adafactor_on_their_logarithms():
    """Three steps on given gradients against loops over the rows and groups."""
    torch.manual_seed(0)
    W, grid = quantize_nearest(torch.randn(3, 6), Scheme(4, groupsize=2))
    order = torch.tensor([3, 0, 5, 1, 4, 2])  # as --act-order leaves groups
    W, grid = W[:, order], replace(grid, group=grid.group[order])
    weight, codes = torch.nn.Parameter(W.clone()), grid.codes(W)
    state, (logarithms, squares) = module._Scales(weight, grid), ([[0.0] * 3 for _ in range(3)] for _ in range(2))
    for number in (1, 2, 3):
        gradient, moves = torch.randn(3, 6), [[0.0] * 3 for _ in range(3)]
        for i in range(3):
            for g in range(3):
                slope = sum(gradient[i, j].item() * weight[i, j].item() for j in range(6) if grid.group[j] == g)
                squares[i][g] += (1 - module.DECAY) * (slope**2 - squares[i][g])
                moves[i][g] = slope / math.sqrt(squares[i][g] / (1 - module.DECAY**number))
        clip = max(1, math.sqrt(sum(move**2 for row in moves for move in row) / 9))
        for i in range(3):
            for g in range(3):
                logarithms[i][g] -= module.SCALES_RATE * 0.7 * moves[i][g] / clip
        weight.grad = gradient
        state.step(0.7, number)
        expected = grid.scale * torch.tensor(logarithms).exp()
        torch.testing.assert_close(state.scale, expected, rtol=1e-5, atol=0)
        wanted = (codes.float() - grid.zero[:, grid.group]) * expected[:, grid.group]
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-5, atol=1e-7)


def test_layers_without_chosen_matrices_stay():
    family, model = make("llama")
    pruned, chosen = halved(family, model)
    tokens = torch.randint(0, VOCABULARY, (2, T))
    dense, before, finished = dense_states(StreamedModel(model, family, CPU, 2), tokens), copy.deepcopy(pruned), []
    distill(StreamedModel(pruned, family, CPU, 2), {key: None for key in chosen if key[0] == 1}, tokens, dense, 0,
            lambda index, *_: finished.append(index))
    same = [all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
            for one, other in zip(family.layers_of(before), family.layers_of(pruned), strict=True)]
    assert same == [True, False, True]
    assert finished == [0, 1]


def test_same_seed_same_weights_whatever_the_batch(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)  # of three and two sequences
    family, model = make("llama")
    tokens = torch.randint(0, VOCABULARY, (N, T), generator=torch.Generator().manual_seed(1))
    dense, (pruned, chosen) = dense_states(StreamedModel(model, family, CPU, 2), tokens), halved(family, model)
    models = {(batch_size, seed): copy.deepcopy(pruned) for batch_size, seed in ((2, 4), (1, 4), (2, 5))}
    for (batch_size, seed), trained in models.items():
        distill(StreamedModel(trained, family, CPU, batch_size), chosen, tokens, dense, seed)
    first, same, other = (torch.cat([weight.flatten() for weight in trained.parameters()]).detach()
                          for trained in models.values())
    torch.testing.assert_close(first, same, rtol=0, atol=1e-5)
    assert not torch.allclose(first, other, rtol=0, atol=1e-5)


def test_a_step_is_that_of_adafactor():
    """Three steps on given gradients against loops over the entries."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 4) * (torch.rand(3, 4) < 0.7))
    vector = torch.nn.Parameter(torch.randn(5))
    gradients = [(torch.randn(3, 4), torch.randn(5)) for _ in range(3)]
    expected = [weight.detach().double().clone(), vector.detach().double().clone()]
    rows, columns, each = [0.0] * 3, [0.0] * 4, [0.0] * 5
    for number, (G, g) in enumerate(gradients, 1):
        kept = [(i, j) for i in range(3) for j in range(4) if expected[0][i, j] != 0]
        G = torch.where(expected[0] != 0, G, 0).double()
        unbias = 1 - module.DECAY**number
        for i in range(3):
            rows[i] += (1 - module.DECAY) * (sum(G[i, j]**2 for j in range(4)).item() / 4 - rows[i])
        for j in range(4):
            columns[j] += (1 - module.DECAY) * (sum(G[i, j]**2 for i in range(3)).item() / 3 - columns[j])
        for i in range(5):
            each[i] += (1 - module.DECAY) * (g[i].item()**2 - each[i])
        mean = sum(rows) / 3 / unbias
        change = {(i, j): G[i, j].item() / math.sqrt(rows[i] / unbias * columns[j] / unbias / mean) for i, j in kept}
        size = math.sqrt(sum(expected[0][key].item()**2 for key in kept) / len(kept))
        clip = max(1, math.sqrt(sum(value**2 for value in change.values()) / len(kept)))
        for key, value in change.items():
            expected[0][key] -= 0.1 * size * value / clip
        moves = [g[i].item() / math.sqrt(each[i] / unbias) for i in range(5)]
        size, clip = expected[1].square().mean().sqrt().item(), max(1, math.sqrt(sum(m * m for m in moves) / 5))
        expected[1] -= 0.1 * size / clip * torch.tensor(moves, dtype=torch.float64)
    states = [module._Weight(weight), module._Weight(vector)]
    for number, pair in enumerate(gradients, 1):
        for state, gradient in zip(states, pair, strict=True):
            state.weight.grad = gradient.clone()
            state.step(0.1 / module.RATE, number)
    torch.testing.assert_close(weight.detach().double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vector.detach().double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part, message", [("loss", "the divergence from the dense model is nan"),
                                           ("gradients", "gradients became infinite")])
def test_what_is_not_finite_is_recognised(part, message, monkeypatch):
    family, model = make("llama")
    pruned, chosen = halved(family, model)
    tokens = torch.randint(0, VOCABULARY, (1, T))  # one step
    dense, divergence = dense_states(StreamedModel(model, family, CPU, 2), tokens), module._divergence
    if part == "loss":
        dense *= torch.nan
    else:
        monkeypatch.setattr(module, "_divergence", lambda *given: (divergence(*given)[0], given[1] * torch.inf))
    with pytest.raises(module.Diverged, match=message):
        distill(StreamedModel(pruned, family, CPU, 2), chosen, tokens, dense, 0)


def test_the_rate_rises_and_falls():
    rates = [schedule(number, 20) for number in range(1, 21)]
    assert rates[0] == pytest.approx(0.5) and max(rates) == rates[1] <= 1
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 0.01


def least_room(streamed, tokens, monkeypatch):
    """Return the fewest free bytes with which `room_for` lets as many sequences be a batch as ever."""
    few, enough = 0, 2**40
    while enough - few > 1:
        middle = (few + enough) // 2
        with monkeypatch.context() as patched:
            patched.setattr(memory, "free", lambda device, free=middle: free)
            few, enough = (few, middle) if module.room_for(streamed, tokens) == 4 else (middle, enough)
    return enough


def peak_on_a_cpu(step, folder):
    """Return the most bytes of tensors that a step holds beside those of before, as PyTorch's profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = [event for event in json.loads((folder / "trace.json").read_text())["traceEvents"]
              if event["name"] == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        used += event["args"]["Bytes"]
        peak = max(peak, used)
    return peak


@pytest.mark.parametrize("name, dtype, device", [
    ("llama", torch.bfloat16, CPU), ("qwen3-moe", torch.float32, CPU), ("llama", torch.float32, CUDA),
    ("opt", torch.bfloat16, CUDA)], ids=str)
def test_what_fits_is_about_the_peak_and_without_room_for_it_nothing_does(name, dtype, device, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "STEP_TOKENS", 1024)
    family, model = make(name)
    split_experts(model)
    model.to(dtype)
    tokens = torch.randint(0, VOCABULARY, (16, 64))
    dense = dense_states(StreamedModel(model, family, CPU, 2), tokens)
    streamed, chosen = StreamedModel(model, family, device, 4), dict.fromkeys(select(model, family))
    if device == CPU:
        counted = least_room(streamed, tokens, monkeypatch)
        peak = peak_on_a_cpu(lambda: distill(streamed, chosen, tokens, dense, 0), tmp_path)
    else:
        with Gpu() as gpu:
            counted = least_room(streamed, tokens, monkeypatch)
            distill(streamed, chosen, tokens, dense, 0)
            peak = gpu.peak
    assert 0.95 * peak <= counted <= 1.5 * peak  # of memory.free, which leaves a tenth


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_smaller_batches_take_less_and_a_model_that_does_not_fit_has_no_room(device, monkeypatch):
    family, model = make("llama")
    tokens, streamed = torch.zeros(100, 10, dtype=torch.long), StreamedModel(model, family, device, 4, clock=object())
    rooms = []
    for free in range(0, 2_000_000, 10_000):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        rooms.append(module.room_for(streamed, tokens))
    assert rooms == sorted(rooms) and set(rooms) == {0, 1, 2, 3, 4}
    assert 0 < rooms.count(0) * 10_000 - 12 * sum(w.numel() for w in model.parameters()) < 500_000
    assert module.room_for(streamed, tokens[:32]) == 2  # of a step


FAILURES = {
    "host": (MemoryError(), memory.OutOfMemory),
    "GPU": (torch.OutOfMemoryError("CUDA out of memory"), memory.OutOfGpuMemory),
    "infinite": (None, module.Diverged), "bug": (RuntimeError("unforeseen"), RuntimeError)}


@pytest.mark.parametrize("part, each, failure, step", [  # 13: matrices of a layer, and all norms
    ("_backward", 1, "host", 1), ("_backward", 1, "GPU", 5), ("_backward", 1, "infinite", 5), ("step", 13, "bug", 1),
    ("step", 13, "host", 5), ("step", 13, "GPU", 1)])
def test_a_model_that_cannot_be_distilled_is_what_it_was(part, each, failure, step, monkeypatch):
    family, model = make("llama")
    pruned, grids = quantized(family, model, SCHEMES["groups"])
    grids |= dict.fromkeys([key for key in grids if key[0] == 1])  # scales of two layers are trained, weights of one
    tokens = torch.randint(0, VOCABULARY, (N, T))
    dense, before = dense_states(StreamedModel(model, family, CPU, 2), tokens), copy.deepcopy((pruned, grids))
    owner, (error, expected), calls = module if part == "_backward" else module._Weight, FAILURES[failure], []
    work = getattr(owner, part)

    def failing(*given):
        calls.append(given)
        if len(calls) != step * each:
            return work(*given)
        if error:
            raise error
        return work(*given) * torch.inf

    monkeypatch.setattr(owner, part, failing)
    with pytest.raises(expected):
        distill(StreamedModel(pruned, family, CPU, 1), grids, tokens, dense, 0, lambda *_: pytest.fail("finished"))
    assert len(calls) == step * each
    for (name, weight), old in zip(pruned.named_parameters(), before[0].parameters(), strict=True):
        assert torch.equal(weight, old) and weight.requires_grad and weight.grad is None, name
    for key, grid in grids.items():
        assert grid is None or torch.equal(grid.scale, before[1][key].scale)


def test_steps_are_few_and_have_enough_tokens(monkeypatch):
    monkeypatch.setattr(module, "STEP_TOKENS", 1024)
    for shape, world, expected in (((128, 128), 1, 8), ((2048, 128), 1, 128), ((32, 128), 1, 8), ((3, 32), 1, 3),
                                   ((40, 2048), 1, 3), ((32, 128), 2, 4), ((128, 128), 3, 3)):
        monkeypatch.setattr(distributed, "world", lambda world=world: world)
        assert module._per_step(torch.zeros(shape)) == expected
