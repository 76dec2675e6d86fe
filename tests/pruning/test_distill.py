"""Check distillation against the model's own full forward, autograd's gradients and a step written with loops."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, VOCABULARY, make

from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.modeling.experts import split_experts
from mixgpt.pruning import distill as module
from mixgpt.pruning.distill import dense_states, distill, schedule
from mixgpt.pruning.targets import select
from modelutils import Execution, linears

N, T = 5, 9


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 1)


def halved(family, model):
    """Return a copy of a model of which a random half of the chosen matrices' weights is zero, and what was chosen."""
    pruned, chosen = copy.deepcopy(model), list(select(model, family))
    generator = torch.Generator().manual_seed(3)
    for index, name in chosen:
        weight = linears(family.layers_of(pruned)[index])[name].weight.data
        weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    return pruned, chosen


@pytest.fixture(params=["llama", "opt", "bloom", "baichuan-13b", "gemma2", "qwen3-moe"])
def case(request):
    """Give (family, dense model, pruned model, chosen matrices, tokens, dense hidden states), in float64."""
    family, model = make(request.param)
    split_experts(model)
    model.double()
    pruned, chosen = halved(family, model)
    tokens = torch.randint(0, VOCABULARY, (N, T), generator=torch.Generator().manual_seed(1))
    return family, model, pruned, chosen, tokens, dense_states(Execution(model, family, CPU, 2), tokens)


def divergence(model, pruned, tokens):
    """Return KL(p ‖ q) per token, of predictions by the models' own forwards."""
    with torch.no_grad():
        log_p = model(tokens, use_cache=False).logits.log_softmax(-1)
    log_q = pruned(tokens, use_cache=False).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def test_gradients_are_those_of_the_divergence_from_the_dense_model(case, monkeypatch):
    family, model, pruned, chosen, tokens, dense = case
    found = []

    def keep(state, rate, number):
        found.append(state.weight.grad)
        state.weight.grad = None

    monkeypatch.setattr(module._State, "step", keep)
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "TOKENS", 7)  # several parts
    means = distill(Execution(pruned, family, CPU, 2), chosen, tokens, dense, 1, 0)
    with module._trained(family.layers_of(pruned), chosen) as weights, torch.enable_grad():
        expected = divergence(model, pruned, tokens)
        wanted = torch.autograd.grad(expected * N * T, weights, allow_unused=True)
    assert means == pytest.approx([expected.item()], rel=1e-5)  # summed in float32
    assert len(found) == len(weights) > len(chosen)
    for weight, gradient, other in zip(weights, found, wanted, strict=True):
        other = torch.zeros_like(weight) if other is None else other  # experts without tokens
        gradient = torch.zeros_like(weight) if gradient is None else gradient
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


def test_kept_weights_norms_and_biases_learn_and_all_else_stays(case):
    family, model, pruned, chosen, tokens, dense = case
    before = copy.deepcopy(pruned.state_dict())
    start = divergence(model, pruned, tokens).item()
    means = distill(Execution(pruned, family, CPU, 2), chosen, tokens, dense, 8, 0)
    assert divergence(model, pruned, tokens).item() < 0.95 * start
    assert len(means) == 8 and means[-1] < means[0]
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


def test_layers_without_chosen_matrices_stay():
    family, model = make("llama")
    pruned, chosen = halved(family, model)
    tokens = torch.randint(0, VOCABULARY, (2, T))
    dense, before, finished = dense_states(Execution(model, family, CPU, 2), tokens), copy.deepcopy(pruned), []
    distill(Execution(pruned, family, CPU, 2), [key for key in chosen if key[0] == 1], tokens, dense, 2, 0,
            lambda index, *_: finished.append(index))
    same = [all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
            for one, other in zip(family.layers_of(before), family.layers_of(pruned), strict=True)]
    assert same == [True, False, True]
    assert finished == [0, 1]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_same_seed_same_weights_whatever_the_batch(case, batch_size, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)  # of three and two sequences
    family, model, pruned, chosen, tokens, dense = case
    other = copy.deepcopy(pruned)
    distill(Execution(pruned, family, CPU, 2), chosen, tokens, dense, 2, 4)
    distill(Execution(other, family, CPU, batch_size), chosen, tokens, dense, 2, 4)
    for one, two in zip(pruned.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_the_seed_orders_the_sequences():
    family, model = make("llama")
    pruned, chosen = halved(family, model)
    tokens = torch.randint(0, VOCABULARY, (N, T))
    dense, found = dense_states(Execution(model, family, CPU, 2), tokens), []
    for seed in (4, 4, 5):
        trained = copy.deepcopy(pruned)
        distill(Execution(trained, family, CPU, 2), chosen, tokens, dense, 1, seed)
        found.append(torch.cat([weight.flatten() for weight in trained.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


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
    states = [module._State(weight), module._State(vector)]
    for number, pair in enumerate(gradients, 1):
        for state, gradient in zip(states, pair, strict=True):
            state.weight.grad = gradient.clone()
            state.step(0.1, number)
    torch.testing.assert_close(weight.detach().double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vector.detach().double(), expected[1], rtol=1e-5, atol=1e-6)


def test_a_matrix_of_zeros_stays_as_it_is():
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    state = module._State(weight)
    weight.grad = torch.ones(3, 4)
    state.step(0.1, 1)
    assert torch.equal(weight, torch.zeros(3, 4)) and torch.equal(state.exact, torch.zeros(3, 4))


def test_gradients_that_overflow_are_one_line(monkeypatch):
    family, model = make("llama")
    pruned, chosen = halved(family, model)
    tokens = torch.randint(0, VOCABULARY, (1, T))  # one step
    dense, divergence = dense_states(Execution(model, family, CPU, 2), tokens), module._divergence
    monkeypatch.setattr(module, "_divergence", lambda *given: (divergence(*given)[0], given[1] * torch.inf))
    with pytest.raises(InputError, match="--distill: gradients became infinite; try --dtype bfloat16"):
        distill(Execution(pruned, family, CPU, 2), chosen, tokens, dense, 1, 0)


def test_the_rate_rises_and_falls():
    rates = [schedule(number, 20) for number in range(1, 21)]
    assert rates[0] == pytest.approx(0.5) and max(rates) == rates[1] <= 1
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 0.01


def test_weights_that_are_not_finite_are_one_line(case):
    family, _, pruned, chosen, tokens, dense = case
    with pytest.raises(InputError, match="--distill: the divergence from the dense model is nan; try --dtype bfloat16"):
        distill(Execution(pruned, family, CPU, 2), chosen, tokens, dense * torch.nan, 1, 0)


def test_batches_fit_into_the_memory_of_a_gpu_or_there_is_no_room(monkeypatch):
    family, model = make("llama")
    layers = family.layers_of(model)
    gpu = SimpleNamespace(model=model, layers=layers, device=torch.device("cuda"), batch_size=4)
    tokens = torch.zeros(100, 10, dtype=torch.long)  # 7 of them in a step
    matrices = [linear for layer in layers for linear in linears(layer).values()]
    weights = 12 * sum(weight.numel() for weight in model.parameters()) + 12 * 48 * 32  # float32: itself and two more
    sequence = 1.5 * 4 * 10 * sum(linear.in_features + linear.out_features for linear in matrices)
    for sequences, expected in ((9, 4), (4.1, 4), (3.9, 3), (1.1, 1), (0.9, 0), (-1, 0)):
        monkeypatch.setattr(module, "free_memory", lambda _, n=sequences: (weights + n * sequence) / 0.9)
        assert module.room_for(gpu, tokens) == expected
    assert module.room_for(Execution(model, family, CPU, 4), tokens) == 4
    assert module.room_for(Execution(model, family, CPU, 4), tokens[:32]) == 2


def test_steps_are_few_and_have_enough_tokens(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 1024)
    for shape, world, expected in (((128, 128), 1, 8), ((2048, 128), 1, 128), ((32, 128), 1, 8), ((3, 32), 1, 3),
                                   ((40, 2048), 1, 3), ((32, 128), 2, 4), ((128, 128), 3, 3)):
        monkeypatch.setattr(distributed, "world", lambda world=world: world)
        assert module._per_step(torch.zeros(shape)) == expected


def test_batches_have_as_many_tokens_as_elsewhere():
    family, model = make("llama")
    execution = Execution(model, family, CPU, 2)
    for t, expected in ((16, 8), (64, 2), (100, 2)):
        assert module.widened(execution, torch.zeros(3, t), 64).batch_size == expected
