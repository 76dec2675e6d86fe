"""Check distillation against the model's own full forward, autograd's gradients and a step written with loops."""

import contextlib
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, VOCABULARY, make, modules_of
from makebelieve import CUDA, Gpu
from torch.profiler import ProfilerActivity, profile

from mixgpt.checkpoints import load
from mixgpt.common import memory
from mixgpt.modeling import running
from mixgpt.modeling.decoder import layers_of, path_of
from mixgpt.modeling.experts import split_experts
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import distill as module
from mixgpt.pruning.distill import distill, reference_states
from mixgpt.pruning.targets import select
from mixgpt.quant import Scheme, quantize_nearest

N, T = 5, 9
SCHEMES = {"rows": Scheme(3), "groups": Scheme(4, groupsize=8, sym=True)}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(module, "STEP_TOKENS", 1)


class Scene:
    """A dense model, a copy of which a random half of the weights is zero, and what distillation reads."""

    def __init__(self, name="llama", dtype=torch.float32, scheme=None, shape=(N, T), most=VOCABULARY):
        """scheme: of the grids on which the kept weights lie, `chosen`, {(layer, name): Grid or None}."""
        self.model = make(name)
        split_experts(self.model)
        self.model.to(dtype).requires_grad_(False)
        self.pruned, self.chosen = copy.deepcopy(self.model), dict.fromkeys(select(self.model))
        generator = torch.Generator().manual_seed(3)
        for key in self.chosen:
            weight = self.weight(key)
            weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
            if scheme:
                rounded, self.chosen[key] = quantize_nearest(weight, scheme)
                weight.copy_(rounded)
        self.tokens = torch.randint(0, most, shape, generator=torch.Generator().manual_seed(1))
        self.dense = reference_states(StreamedModel(self.model, CPU, 2), self.tokens)
        self.before = copy.deepcopy((self.pruned, self.chosen))

    def weight(self, key, model=None):
        return modules_of(model or self.pruned)[key].weight.data

    def distill(self, times=1, seed=0, batch_size=2, finish=None):
        return distill(StreamedModel(self.pruned, CPU, batch_size), self.chosen, self.tokens.repeat(times, 1),
                       self.dense | {"states": self.dense["states"].repeat(times, 1, 1)}, seed, finish)

    def divergence(self, pruned=None, most=VOCABULARY):
        """Return KL(p ‖ q) per predicted token, and the loss, by the models' own forwards.

        Predictions are of the text's tokens and those that are most probable.
        """
        labels = self.tokens[:, 1:]
        with torch.no_grad():
            logits = self.model(self.tokens, use_cache=False).logits
            some = logits.flatten(0, 1)[::max(self.tokens.numel() // module.SLICE, 1)]
            of_text = self.tokens.unique().tolist()
            others = [token for token in some.softmax(-1).mean(0).argsort(descending=True).tolist()
                      if token not in of_text]
            seen = torch.tensor((of_text + others)[:most])
            log_p = logits[:, :-1, seen].log_softmax(-1)
        log_q = (pruned or self.pruned)(self.tokens, use_cache=False).logits[:, :-1, seen].log_softmax(-1)
        likelihood = (log_q * (seen == labels[..., None])).sum(-1)
        cross_entropy = -(log_p.exp() * log_q).sum(-1)
        loss = (1 - module.LABELS) * cross_entropy - module.LABELS * likelihood
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean(), loss.mean()


@pytest.fixture(params=["opt", "baichuan-13b", "bloom", "gemma4", "qwen3-moe"])
def name(request):
    return request.param


def test_an_effort_multiplies_the_steps_down_to_a_thousand_tokens_each(monkeypatch):
    monkeypatch.setattr(module, "STEP_TOKENS", 1024)
    tokens = torch.zeros(128, 512)
    assert [-(-128 // module.per_step(tokens, effort)) for effort in (0.25, 1, 2, 4)] == [10, 32, 64, 64]


@pytest.mark.parametrize("most", [VOCABULARY, VOCABULARY // 3])
def test_gradients_are_those_of_the_loss(name, most, monkeypatch):
    for constant, value in {"VOCABULARY": most, "STEPS": 1, "SLICE": 7}.items():  # 7: several parts
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(running, "CACHED", 1)  # a row at a time
    scene, found = Scene(name, torch.float64), []
    monkeypatch.setattr(module, "_step", lambda states, *_: found.extend(state.weight.grad for state in states))
    mean = scene.distill()
    with module._trained(layers_of(scene.pruned), scene.chosen) as weights, torch.enable_grad():
        expected, loss = scene.divergence(most=most)
        wanted = torch.autograd.grad(loss * N * (T - 1), weights, allow_unused=True)
    assert mean == pytest.approx(expected.item(), rel=1e-5)  # summed in float32
    assert len(found) == len(weights) == len(scene.chosen)
    for weight, *pair in zip(weights, found, wanted, strict=True):
        gradient, other = (torch.zeros_like(weight) if each is None else each for each in pair)  # experts without token
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_would_end_at_zero_if_the_divergence_were_linear_and_their_later_ones_are_averaged(dtype, monkeypatch):
    generator, divergences = torch.Generator().manual_seed(0), [3.0, 1.0, 2.0, 1.0, 0.5]
    shapes = (4, 6), (3, 8)
    before = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    before[0][:, ::2] = 0
    gradients = [[torch.randn(shape, generator=generator).mul(10).to(dtype) for shape in shapes] for _ in divergences]
    for gradient, *_ in gradients:
        gradient[1] = 0  # as of an output that nothing reads
    exact, passed = [weight.double() for weight in before], []
    for divergence, step in zip(divergences, gradients, strict=True):
        steps, fall = [], 0
        for W, gradient in zip(exact, step, strict=True):
            kept = gradient.double() * (W != 0)
            size = W.square().sum(1).mean().sqrt()  # of a row
            steps.append(torch.stack([row / row.norm() * size if row.any() else row for row in kept]))
            fall += (steps[-1] * kept).sum()
        exact = [W - divergence / fall * change for W, change in zip(exact, steps, strict=True)]
        passed.append(exact)

    weights = [torch.nn.Parameter(weight.clone()) for weight in before]
    states = [module._Weight(weight) for weight in weights]
    left = iter(zip(divergences, gradients, strict=True))

    def backward(*_):
        divergence, step = next(left)
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient + (0 if weight.grad is None else weight.grad)
        return torch.tensor(divergence)

    monkeypatch.setattr(module, "_backward", backward)
    with torch.no_grad():
        mean = module._train(SimpleNamespace(batch_size=2, device=CPU), None, None, states,
                             [torch.arange(2), *[torch.arange(1)] * 4], None, torch.zeros(2, T))
    assert mean == pytest.approx(sum(divergences) / 6 / T)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-4  # of the distance from the last, in the dtype of weights
    for state, weight, start, *of in zip(states, weights, before, *passed, strict=True):
        mean = torch.stack(of[2:]).mean(0)
        torch.testing.assert_close(state.exact.double(), mean, rtol=0, atol=tolerance)
        assert (of[-1] - mean).abs().max() > 10 * tolerance
        assert torch.equal(weight, state.exact.to(dtype)) and torch.equal(weight == 0, start == 0)


def test_kept_weights_learn_and_all_else_stays(name):
    scene = Scene(name, torch.float64)
    divergence, start = scene.divergence()
    scene.distill(times=8)
    assert scene.divergence()[1] < start - 0.05 * divergence
    trained, before = {f"{path_of(scene.pruned, *key)}.weight" for key in scene.chosen}, scene.before[0].state_dict()
    for name, weight in scene.pruned.state_dict().items():
        if name in trained:
            assert torch.equal(weight == 0, before[name] == 0), name
            assert not torch.equal(weight, before[name]) or ".experts." in name, name
        else:
            assert torch.equal(weight, before[name]), name
    assert not any(weight.grad is not None for weight in scene.pruned.parameters())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gradients_of_scales_are_those_of_the_loss(name, scheme, monkeypatch):
    scene, found = Scene(name, scheme=scheme), []
    weights = {f"{path_of(scene.pruned, *key)}.weight": grid for key, grid in scene.chosen.items()}
    before = dict(scene.before[0].named_parameters())
    factors = {name: torch.full_like(grid.scale, 2.0, requires_grad=True) for name, grid in weights.items()}
    scaled = {name: before[name] * (factors[name] / 2)[:, grid.group] for name, grid in weights.items()}

    def forward(tokens, **more):
        return torch.func.functional_call(scene.pruned, before | scaled, (tokens,), more)

    def step(states, *_):
        for state in states:
            state.exact.fill_(2)  # as if factors had moved
            found.append(torch.zeros_like(state.exact) if state.weight.grad is None else state.gradient())
            state.exact.fill_(1)

    wanted = torch.autograd.grad(scene.divergence(forward)[1] * N * (T - 1), list(factors.values()), allow_unused=True)
    monkeypatch.setattr(module, "_step", step)
    monkeypatch.setattr(module, "STEPS", 1)
    scene.distill()
    for gradient, other in zip(found, wanted, strict=True):
        other = torch.zeros_like(gradient) if other is None else other  # experts without tokens
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    assert all(torch.equal(weight, before[name]) for name, weight in scene.pruned.named_parameters())


@pytest.mark.parametrize("scheme, dtype", [(SCHEMES["rows"], torch.float32), (SCHEMES["groups"], torch.float32),
                                           (Scheme(8), torch.bfloat16)], ids=str)
def test_scales_learn_and_codes_stay(scheme, dtype):
    scene = Scene(scheme=scheme, dtype=dtype)
    divergence, start = scene.divergence()
    scene.distill(times=8)
    assert scene.divergence()[1] < start - 0.03 * divergence
    for key, grid in scene.chosen.items():
        weight, was, old = scene.weight(key), scene.weight(key, scene.before[0]), scene.before[1][key]
        codes = grid.codes(weight)  # raises what is not on the grid
        assert torch.equal(codes, old.codes(was)) or dtype == torch.bfloat16  # where two stand for one weight
        assert torch.equal(grid.weights(codes), weight) and torch.equal(weight == 0, was == 0)
        assert torch.equal(grid.zero, old.zero) and (grid.scale > 0).all()
        assert (grid.scale != old.scale).double().mean() > 0.5  # some units are dead


def test_layers_without_chosen_matrices_stay():
    scene, finished = Scene(), []
    scene.chosen = {key: None for key in scene.chosen if key[0] == 1}
    scene.distill(finish=lambda index, *_: finished.append(index))
    same = [all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
            for one, other in zip(*map(layers_of, (scene.before[0], scene.pruned)), strict=True)]
    assert same == [True, False, True]
    assert finished == [0, 1]


def test_same_seed_same_weights_whatever_the_batch(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)  # of three and two sequences
    found = []
    for batch_size, seed in ((2, 4), (1, 4), (2, 5)):
        scene = Scene()
        scene.distill(seed=seed, batch_size=batch_size)
        found.append(torch.nn.utils.parameters_to_vector(scene.pruned.parameters()).detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], found[2], rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("name, dtype, device, most", [
    ("llama", torch.bfloat16, CPU, VOCABULARY), ("qwen3-moe", torch.float32, CPU, VOCABULARY),
    ("llama", torch.float32, CUDA, VOCABULARY), ("opt", torch.bfloat16, CUDA, VOCABULARY),
    ("opt", torch.bfloat16, CUDA, VOCABULARY // 5)], ids=str)
def test_what_fits_is_about_the_peak_and_without_room_for_it_nothing_does(name, dtype, device, most, monkeypatch,
                                                                          tmp_path):
    monkeypatch.setattr(module, "STEP_TOKENS", 1024)
    monkeypatch.setattr(module, "VOCABULARY", most)
    scene = Scene(name, dtype, shape=(16, 64), most=most)
    with Gpu() if device == CUDA else contextlib.nullcontext() as gpu:
        streamed = StreamedModel(scene.pruned, device, 4)
        counted = least_room(streamed, scene.tokens, monkeypatch)
        peak = peak_on_a_cpu(lambda: distill(streamed, scene.chosen, scene.tokens, scene.dense, 0), tmp_path)
    peak = gpu.peak if gpu else peak
    assert 0.95 * peak <= counted <= 1.5 * peak  # of memory.free, which leaves a tenth


def test_no_copy_is_counted_of_weights_that_can_be_read_from_disk_again(checkpoint_folder, monkeypatch):
    folder, tokens = str(checkpoint_folder("llama")), torch.zeros(16, 64, dtype=torch.long)
    monkeypatch.setattr(module, "STEP_TOKENS", 1024)
    on_disk, in_memory = load.open_model(folder, load.read_config(folder), "auto"), load.load_model(folder, "auto")
    rooms = [least_room(StreamedModel(model, CPU, 4), tokens, monkeypatch) for model in (on_disk, in_memory)]
    of_layers = sum(weight.nbytes for layer in layers_of(in_memory) for weight in layer.parameters())
    assert rooms[0] - rooms[1] == sum(weight.nbytes for weight in in_memory.parameters()) - of_layers


@pytest.mark.parametrize("part, call, failure, expected", [
    ("_backward", 1, MemoryError(), memory.OutOfMemory),
    ("_backward", 5, torch.OutOfMemoryError("CUDA out of memory"), memory.OutOfGpuMemory),
    ("_backward", 5, lambda divergence: divergence * torch.inf, module.Diverged),
    ("divergence_of", 5, lambda result: (result[0], result[1] * torch.inf), module.Diverged),
    ("_step", 1, RuntimeError("unforeseen"), RuntimeError),
    ("_step", 5, MemoryError(), memory.OutOfMemory)])
def test_a_model_that_cannot_be_distilled_is_what_it_was(part, call, failure, expected, monkeypatch):
    scene, calls = Scene(scheme=SCHEMES["groups"]), []
    # scales of two layers are trained, weights of one
    scene.chosen |= dict.fromkeys([key for key in scene.chosen if key[0] == 1])
    work = getattr(module, part)

    def failing(*given):
        calls.append(given)
        if len(calls) == call and isinstance(failure, Exception):
            raise failure
        return failure(work(*given)) if len(calls) == call else work(*given)

    monkeypatch.setattr(module, part, failing)
    with pytest.raises(expected):
        scene.distill(batch_size=1, finish=lambda *_: pytest.fail("finished"))
    assert len(calls) == call
    for weight, old in zip(scene.pruned.parameters(), scene.before[0].parameters(), strict=True):
        assert torch.equal(weight, old) and not weight.requires_grad and weight.grad is None
    for key, grid in scene.chosen.items():
        assert grid is None or torch.equal(grid.scale, scene.before[1][key].scale)


@pytest.mark.parametrize("T, length", [
    (2048, 128), (2000, 125), (4000, 125), (254, 127), (128, 128), (96, 96), (24, 24), (262, 262), (2039, 2039)])
def test_pieces_are_as_long_as_divides_the_sequences_up_to_128_tokens(T, length):
    """Of sequences that only numbers below 16 divide they are whole."""
    assert module.pieces(torch.zeros(3, T)).shape == (3 * T // length, length)
