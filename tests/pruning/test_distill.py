"""Check distillation against the model's own full forward, autograd's gradients and a step written with loops."""

import contextlib
import copy
import json
import operator
from dataclasses import replace

import pytest
import torch
from conftest import CPU, VOCABULARY, make, modules_of, slow_but
from makebelieve import CUDA, Gpu
from torch.profiler import ProfilerActivity, profile

from mixgpt.checkpoints import load
from mixgpt.common import memory
from mixgpt.modeling import running
from mixgpt.modeling.decoder import layers_of, path_of
from mixgpt.modeling.experts import split_experts
from mixgpt.modeling.linears import linears as modules_in
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import distill as module
from mixgpt.pruning import training
from mixgpt.pruning.distill import distill, reference_states
from mixgpt.pruning.needs import WAYS
from mixgpt.pruning.targets import select
from mixgpt.quant import Codebooks, Scheme, quantize_nearest

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

    def distill(self, times=1, seed=0, batch_size=2, finish=None, way=WAYS[0], model=None):
        return distill(StreamedModel(model or self.pruned, CPU, batch_size), self.chosen, self.tokens.repeat(times, 1),
                       self.dense | {"states": self.dense["states"].repeat(times, 1, 1)}, seed,
                       replace(way, batch_size=batch_size), finish)

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
        loss = (1 - training.LABELS) * cross_entropy - training.LABELS * likelihood
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean(), loss.mean()


@pytest.fixture(params=["opt", "baichuan-13b", "bloom", "gemma4", "qwen3-moe"])
def name(request):
    return request.param


def test_an_effort_multiplies_the_steps_down_to_a_thousand_tokens_each(monkeypatch):
    monkeypatch.setattr(module, "STEP_TOKENS", 1024)
    tokens = torch.zeros(128, 512)
    assert [-(-128 // module.per_step(tokens, effort)) for effort in (0.25, 1, 2, 4)] == [10, 32, 64, 64]


def gradients(scene, monkeypatch):
    """Let no step change a weight. Returns {matrix: [gradient of each step]}."""
    found, update = {key: [] for key in scene.chosen}, training.Training._update

    def observed(running, index, layer, kept, given):
        for name, state in running.states[index].items():
            def gradient(weight, of=state, key=(index, name)):
                found[key].append(type(of).gradient(of, weight).clone())
                return torch.zeros_like(found[key][-1])
            state.gradient = gradient
        update(running, index, layer, kept, given)

    monkeypatch.setattr(training.Training, "_update", observed)
    return found


@pytest.mark.parametrize("most, way", [(VOCABULARY, WAYS[0]), (VOCABULARY // 3, WAYS[-1])])
def test_gradients_are_those_of_the_loss(name, most, way, monkeypatch):
    for constant, value in {"VOCABULARY": most, "STEPS": 1, "SLICE": 7}.items():  # 7: several parts
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(training, "SLICE", 7)
    monkeypatch.setattr(running, "CACHED", 1)  # a row at a time
    scene = Scene(name, torch.float64)
    found = gradients(scene, monkeypatch)
    mean = scene.distill(way=way)
    weights = [modules_of(scene.pruned)[key].weight.requires_grad_() for key in scene.chosen]
    with torch.enable_grad():
        expected, loss = scene.divergence(most=most)
        wanted = torch.autograd.grad(loss * N * (T - 1), weights, allow_unused=True)
    assert mean == pytest.approx(expected.item(), rel=1e-5)  # summed in float32
    for key, weight, other in zip(scene.chosen, weights, wanted, strict=True):
        other = torch.zeros_like(weight) if other is None else other * (weight != 0)  # experts without tokens
        assert len(found[key]) == 2  # A first pass measures alone.
        for gradient in found[key]:
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_would_end_at_zero_if_the_divergence_were_linear_and_later_ones_are_shorter(dtype, monkeypatch):
    """How steep it is, the step before says; the first step, a pass that moves nothing."""
    scene, random = Scene(dtype=dtype), torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "STEPS", 5)
    keys, divergences = list(scene.chosen), [3.0, 3.0, 1.0, 2.0, 1.0, 0.5]
    exact = {key: scene.weight(key).double() for key in keys}
    steps = [{key: torch.randn(scene.weight(key).shape, generator=random).mul(10).to(dtype) for key in keys}
             for _ in divergences]
    for step in steps:
        step[keys[0]][1] = 0  # As of an output that nothing reads.
    fall, start = 0.0, {key: W.clone() for key, W in exact.items()}
    for number, (divergence, step) in enumerate(zip(divergences, steps, strict=True)):
        rate, fall = (divergence / fall if number else 0) * (1, 1, 1, 1, 2 / 3, 1 / 3)[number], 0.0
        for key, gradient in step.items():
            kept = gradient.double() * (exact[key] != 0)
            size = exact[key].square().sum(1).mean().sqrt()  # of a row
            change = torch.stack([row / row.norm() * size if row.any() else row for row in kept])
            fall += (change * kept).sum().item()
            exact[key] -= rate * change
    calls = iter(zip(divergences, steps, strict=True))

    def turn(running, batch):
        divergence, running.planned = next(calls)
        batch.gradient = torch.zeros_like(batch.borders[-1])
        return torch.tensor(divergence)

    def gradient(state, weight):
        return planned[id(weight)] * (weight != 0)

    planned, update = {}, training.Training._update

    def replaced(running, index, layer, *given):
        for name, linear in modules_in(layer).items():
            planned[id(linear.weight)] = running.planned[index, name]
        update(running, index, layer, *given)

    monkeypatch.setattr(training.Training, "_turn", turn)
    monkeypatch.setattr(training.Training, "_update", replaced)
    monkeypatch.setattr(training._Weight, "gradient", gradient)
    monkeypatch.setattr(module, "per_step", lambda *_: 1)
    mean = scene.distill()
    assert mean == pytest.approx(sum(divergences[1:]) / N / (T - 1))
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8 * exact[keys[0]].abs().max().item()
    for key in keys:
        torch.testing.assert_close(scene.weight(key).double(), exact[key], rtol=0, atol=tolerance)
        assert torch.equal(scene.weight(key) == 0, start[key] == 0)


def test_sixteen_bits_and_those_below_add_up_small_changes(monkeypatch):
    monkeypatch.setattr(training, "rows_at_once", lambda device, columns: 2)
    weight, state = torch.ones(3, 4, dtype=torch.bfloat16), training._Weight()
    kept, factors = state.begin(weight), torch.tensor([[1.0], [0.0], [0.5]])
    for _ in range(256):
        state.move(weight, kept, torch.full((3, 4), 2.0**-13), factors)  # bfloat16 rounds each of them to nothing.
    expected = (1 - 2.0**-5 * factors).expand(3, 4)
    assert torch.equal(weight.float() + kept["below"].float(), expected) and torch.equal(weight.float(), expected)


@pytest.mark.parametrize("way", WAYS[1:], ids=str)
@pytest.mark.parametrize("scheme", [None, SCHEMES["groups"]], ids=["weights", "scales"])
@pytest.mark.parametrize("stored", slow_but([torch.bfloat16], [torch.bfloat16, torch.float32]), ids=str)
def test_all_ways_give_the_same_model(way, scheme, stored, checkpoint_folder, tmp_path):
    """Those in memory, and those on disk, which stays as it is."""
    folder, found, divergences = tmp_path / "pruned", [], []
    for chosen, on_disk in ((WAYS[0], False), (way, False), (way, True)):
        scene, finished = Scene(dtype=stored, scheme=scheme), {}
        scene.pruned.save_pretrained(folder)
        before = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
        model = (load.open_model(str(folder), load.read_config(str(folder)), stored) if on_disk
                 else load.load_model(str(folder), stored))
        divergences.append(scene.distill(4, way=chosen, model=model, finish=lambda index, layer, of=finished: of.update(
            {(index, name): tensor.clone() for name, tensor in layer.state_dict().items()})))
        found.append((finished, scene.chosen))
        assert all(file.read_bytes() == content for file, content in before.items())
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-5) == divergences[2]
    for finished, grids in found[1:]:
        assert finished.keys() == found[0][0].keys()
        for key, tensor in finished.items():
            tolerance = 2e-2 if stored == torch.bfloat16 else 1e-4
            torch.testing.assert_close(tensor, found[0][0][key], rtol=tolerance, atol=1e-6)
        for key, grid in grids.items() if scheme else ():
            torch.testing.assert_close(grid.scale, found[0][1][key].scale, rtol=1e-2, atol=1e-6)


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
    scene = Scene(name, scheme=scheme)
    found = gradients(scene, monkeypatch)
    weights = {f"{path_of(scene.pruned, *key)}.weight": grid for key, grid in scene.chosen.items()}
    before = dict(scene.before[0].named_parameters())
    factors = {name: torch.full_like(grid.scale, 2.0, requires_grad=True) for name, grid in weights.items()}
    scaled = {name: before[name] * (factors[name] / 2)[:, grid.group] for name, grid in weights.items()}

    def forward(tokens, **more):
        return torch.func.functional_call(scene.pruned, before | scaled, (tokens,), more)

    wanted = torch.autograd.grad(scene.divergence(forward)[1] * N * (T - 1), list(factors.values()), allow_unused=True)
    start = training._Scales.begin

    def moved(state, weight):
        state.factors.fill_(2)  # As if factors had moved.
        return start(state, weight)

    monkeypatch.setattr(training._Scales, "begin", moved)
    monkeypatch.setattr(training._Scales, "move", lambda *_: None)
    monkeypatch.setattr(module, "STEPS", 1)
    scene.distill()
    for gradient, other in zip([last for *_, last in found.values()], wanted, strict=True):
        other = torch.zeros_like(gradient) if other is None else other  # experts without tokens
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    assert all(torch.equal(weight, before[name]) for name, weight in scene.pruned.named_parameters())


@pytest.mark.parametrize("scheme, dtype", [(SCHEMES["rows"], torch.float32), (SCHEMES["groups"], torch.float32),
                                           (Scheme(8), torch.bfloat16), (Codebooks(4), torch.bfloat16)], ids=str)
def test_scales_learn_and_codes_stay(scheme, dtype):
    scene = Scene(scheme=scheme, dtype=dtype)
    divergence, start = scene.divergence()
    scene.distill(times=8)
    assert scene.divergence()[1] < start - 0.03 * divergence
    for key, grid in scene.chosen.items():
        weight, was, old = scene.weight(key), scene.weight(key, scene.before[0]), scene.before[1][key]
        codes = grid.codes(weight)  # raises what is not on the grid
        assert torch.equal(codes, old.codes(was)) or dtype == torch.bfloat16  # where two stand for one weight
        assert torch.equal(grid.weights(codes).masked_fill(was == 0, 0), weight) and torch.equal(weight == 0, was == 0)
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


@pytest.mark.parametrize("name, dtype, device, most, way", [
    ("llama", torch.bfloat16, CPU, VOCABULARY, WAYS[0]), ("qwen3-moe", torch.float32, CPU, VOCABULARY, WAYS[0]),
    ("llama", torch.float32, CUDA, VOCABULARY, WAYS[0]), ("opt", torch.bfloat16, CUDA, VOCABULARY, WAYS[0]),
    ("opt", torch.bfloat16, CUDA, VOCABULARY // 5, WAYS[0]), ("opt", torch.bfloat16, CUDA, VOCABULARY, WAYS[1]),
    ("llama", torch.bfloat16, CUDA, VOCABULARY, WAYS[2]), ("llama", torch.bfloat16, CUDA, VOCABULARY, WAYS[5]),
    ("llama", torch.bfloat16, CPU, VOCABULARY, WAYS[5])], ids=str)
def test_what_a_way_takes_is_about_the_peak(name, dtype, device, most, way, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "STEP_TOKENS", 1024)
    monkeypatch.setattr(module, "VOCABULARY", most)
    scene, folder, way = Scene(name, dtype, shape=(16, 64), most=most), str(tmp_path), replace(way, batch_size=4)
    scene.pruned.save_pretrained(folder)
    with Gpu() if device == CUDA else contextlib.nullcontext() as gpu:
        streamed = StreamedModel(load.open_model(folder, load.read_config(folder), dtype), device, 4)
        taken = module.training_bytes(streamed, scene.tokens, 1.0, way)
        peak = peak_on_a_cpu(lambda: distill(streamed, scene.chosen, scene.tokens, scene.dense, 0, way), tmp_path)
    peak = gpu.peak if gpu else peak
    assert 0.9 * peak <= taken.device <= 1.5 * peak  # of memory.free, which leaves a tenth
    kept = sum(4 * scene.weight(key).numel() for key in scene.chosen)  # A weight and the bits below it are a float32.
    if way.place != "device":
        assert (taken.host if way.place == "host" else taken.disk) >= kept / (1 + way.whole)


def test_the_first_way_that_fits_is_taken(checkpoint_folder, monkeypatch):
    folder, tokens = str(checkpoint_folder("llama")), torch.zeros(16, 64, dtype=torch.long)
    streamed = StreamedModel(load.open_model(folder, load.read_config(folder), torch.bfloat16), CUDA, 4)
    monkeypatch.setattr(module, "STEP_TOKENS", 1024)

    def found(device, host, disk):
        return module.ways(streamed, tokens, 1.0, disk, lambda place: device if place.type == "cuda" else host)

    ways = [replace(way, batch_size=size) for way in WAYS if way.place != "disk" for size in (4, 1)]
    assert found(2**40, 2**40, 2**40) == ways and not found(0, 2**40, 2**40)
    for way in (replace(way, batch_size=4) for way in WAYS):
        taken = module.training_bytes(streamed, tokens, 1.0, way)
        assert way in found(*taken)
        for place, nbytes in taken._asdict().items():
            assert not nbytes or way not in found(*taken._replace(**{place: nbytes - 1}))


@pytest.mark.parametrize("part, call, failure, expected", [
    ("divergence_of", 1, MemoryError(), memory.OutOfMemory),
    ("divergence_of", 6, torch.OutOfMemoryError("CUDA out of memory"), memory.OutOfGpuMemory),
    ("divergence_of", 6, lambda result: (result[0] * torch.inf, result[1]), training.Diverged),
    ("divergence_of", 6, lambda result: (result[0], result[1] * torch.inf), training.Diverged),
    ("Training._update", 1, RuntimeError("unforeseen"), RuntimeError),
    ("Training._update", 6, MemoryError(), memory.OutOfMemory),
    ("Training._keep", 6, MemoryError(), memory.OutOfMemory)])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[-1]], ids=str)
def test_a_model_that_cannot_be_distilled_is_what_it_was(part, call, failure, expected, way, monkeypatch):
    scene, calls = Scene(scheme=SCHEMES["groups"]), []
    # scales of two layers are trained, weights of one
    scene.chosen |= dict.fromkeys([key for key in scene.chosen if key[0] == 1])
    work = operator.attrgetter(part)(training)

    def failing(*given):
        calls.append(given)
        if len(calls) == call and isinstance(failure, Exception):
            raise failure
        return failure(work(*given)) if len(calls) == call else work(*given)

    monkeypatch.setattr(f"{training.__name__}.{part}", failing)
    with pytest.raises(expected):
        scene.distill(batch_size=1, way=way, finish=lambda *_: pytest.fail("finished"))
    assert len(calls) >= call
    for weight, old in zip(scene.pruned.parameters(), scene.before[0].parameters(), strict=True):
        assert torch.equal(weight, old) and not weight.requires_grad and weight.grad is None
    for key, grid in scene.chosen.items():
        assert grid is None or torch.equal(grid.scale, scene.before[1][key].scale)


@pytest.mark.parametrize("way", [WAYS[0], WAYS[-1]], ids=str)
def test_a_model_on_disk_is_what_it_was_when_distillation_fails(way, checkpoint_folder, tmp_path, monkeypatch):
    scene, folder = Scene(), str(tmp_path)
    scene.pruned.save_pretrained(folder)
    model = load.open_model(folder, load.read_config(folder), torch.float32)
    places = [dict(layer.disk_weights) for layer in layers_of(model)]
    update, calls = training.Training._update, []

    def failing(*given):
        calls.append(given)
        if len(calls) > 4:  # in the second pass
            raise MemoryError
        update(*given)

    monkeypatch.setattr(training.Training, "_update", failing)
    with pytest.raises(memory.OutOfMemory):
        scene.distill(way=way, model=model)
    calls.clear()
    assert [layer.disk_weights for layer in layers_of(model)] == places
    assert all(weight.is_meta and not weight.requires_grad for weight in layers_of(model).parameters())


@pytest.mark.parametrize("T, length", [
    (2048, 128), (2000, 125), (4000, 125), (254, 127), (128, 128), (96, 96), (24, 24), (262, 262), (2039, 2039)])
def test_pieces_are_as_long_as_divides_the_sequences_up_to_128_tokens(T, length):
    """Of sequences that only numbers below 16 divide they are whole."""
    assert module.pieces(torch.zeros(3, T)).shape == (3 * T // length, length)
