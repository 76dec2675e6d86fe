"""Check streamed traces against autograd through the whole model, full Hessians and exact Gauss-Newton matrices."""

import pytest
import torch
from conftest import CPU, FAMILIES, inputs_of, make, modules_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import OPTConfig, OPTForCausalLM

from mixgpt.allocation import backward, fisher, hutchinson
from mixgpt.allocation.traces import hessian_traces
from mixgpt.common import memory
from mixgpt.common.runtime import seeded
from mixgpt.modeling import running
from mixgpt.modeling.experts import split_experts
from mixgpt.modeling.linears import hooked
from mixgpt.modeling.running import StreamedModel


@pytest.fixture
def all_float64(monkeypatch):
    """Let norms and softmax of transformers, which compute in torch.float32, compute in float64 too."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def loss_of(model, sequence, labels=None, vocabulary=slice(None)):
    """Mean cross-entropy of one sequence (T,) in the model's dtype. labels: places in the vocabulary."""
    return torch.nn.functional.cross_entropy(model(sequence[None]).logits[0, :-1, vocabulary],
                                             sequence[1:] if labels is None else labels)


def weights_of(model):
    return [module.weight for module in modules_of(model).values()]


def traces(model, tokens, estimator, batch_size=2, matrices=None, known=None, save=None, **options):
    """Return the samples of the traces of all matrices, or of some."""
    matrices = matrices or list(modules_of(model))
    return hessian_traces(StreamedModel(model, CPU, batch_size), matrices, tokens, estimator, previous=known, save=save,
                          **{"seed": 3} | options)


def whole_model_products(model, tokens, probe=0):
    """zᵀ H z of every block by double backward through the whole model, with the probes of the streamed pass."""
    weights, rows = weights_of(model), []
    for n, sequence in enumerate(tokens):
        Z = [hutchinson.signs(W.shape, seeded(3, n, probe, *matrix), W.dtype)
             for W, matrix in zip(weights, modules_of(model), strict=True)]
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(loss_of(model, sequence), weights, create_graph=True)
            product = sum((G * z).sum() for G, z in zip(gradients, Z, strict=True))
            rows.append(torch.stack([(Hz * z).sum() for Hz, z in zip(torch.autograd.grad(product, weights), Z,
                                                                     strict=True)]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", [*FAMILIES, "gemma4", "qwen3-moe"])
def test_streamed_products_are_those_of_double_backward_through_the_whole_model(name, tokens, all_float64):
    experts, model, tokens = name == "qwen3-moe", make(name), tokens[:3, :10]
    split_experts(model.double())
    expected = whole_model_products(model, tokens)
    off = 1e-6 * expected.abs().max() if experts else 1e-10  # the router's softmax is in float32
    assert (traces(model, tokens, "hutchinson") - expected).abs().max() < off
    assert experts or expected.abs().min() > 1e-6


def test_a_sample_is_the_mean_over_different_probes_of_its_sequence(tokens, all_float64):
    model, tokens = make("opt").double(), tokens[:3, :10]
    first, second = (whole_model_products(model, tokens, probe) for probe in (0, 1))
    assert (traces(model, tokens, "hutchinson", nprobes=2) - (first + second) / 2).abs().max() < 1e-10
    assert (first - second).abs().min() > 1e-6


@torch.no_grad()
def test_gradients_at_experts_are_those_of_any_batch(tokens, all_float64):
    model = make("qwen3-moe")
    split_experts(model)
    model, matrices = model.double(), list(modules_of(model))
    one, five = (traces(model, tokens, "fisher", size) for size in (1, 5))
    assert torch.allclose(one, five, rtol=1e-8)
    one, five = (fisher.output_gradients(StreamedModel(model, CPU, size), matrices, tokens, 3) for size in (1, 5))
    for matrix in matrices:
        assert torch.allclose(one[matrix][0], five[matrix][0], rtol=1e-4)


@pytest.mark.parametrize("estimator", ["hutchinson", "fisher"])
def test_batches_and_chunks_change_nothing(tokens, estimator, all_float64, monkeypatch):
    model = make("bloom")
    model.double()
    whole = traces(model, tokens, estimator, batch_size=5)
    monkeypatch.setattr(backward, "SAVED_AFTER", 0)
    monkeypatch.setattr(fisher, "SLICE", 7)
    monkeypatch.setattr(running, "CACHED", 1)  # a row at a time
    monkeypatch.setattr(hutchinson, "SLICE", 7)
    saved = []
    parts = traces(model, tokens, estimator, save=saved.append)
    assert torch.allclose(parts, whole, rtol=1e-9)
    assert [len(rows) for rows in saved] == [2, 4, 5]
    resumed = traces(model, tokens, estimator, known=saved[0])
    assert torch.equal(resumed, parts)


@pytest.fixture
def minute():
    """An OPT of one layer whose fc1 has 12 weights."""
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(
        vocab_size=11, hidden_size=4, ffn_dim=3, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=4,
        max_position_embeddings=16, init_std=0.7, activation_function="gelu")).eval().double()


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_the_mean_over_all_sign_vectors_is_the_exact_trace(minute, name, all_float64, monkeypatch):
    sequence = torch.randint(0, 11, (6,))
    monkeypatch.setattr(hutchinson, "seeded", lambda *key, device: key)
    monkeypatch.setattr(hutchinson, "signs", lambda shape, key, dtype: torch.tensor(
        [1 - 2 * (key[1] >> bit & 1) for bit in range(12)], dtype=dtype).view(shape))
    samples = traces(minute, sequence.expand(4096, -1), "hutchinson", 512, [(0, name)])

    module = getattr(minute.model.decoder.layers[0], name)

    def loss(W):
        with sdpa_kernel(SDPBackend.MATH):
            logits = torch.func.functional_call(minute, {f"model.decoder.layers.0.{name}.weight": W},
                                                sequence[None]).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], sequence[1:])

    H = torch.autograd.functional.hessian(loss, module.weight.detach()).view(12, 12)
    assert samples.mean().item() == pytest.approx(H.trace().item(), rel=1e-10)
    assert samples.std() > 1e-3 * samples.mean().abs()


def sampled_labels(model, sequence, generator, vocabulary=slice(None)):
    """Labels drawn from the model's own predictions by inverting their distribution function."""
    with torch.no_grad():
        cumulative = model(sequence[None]).logits[0, :-1, vocabulary].softmax(-1).cumsum(-1)
    uniform = torch.rand(len(sequence) - 1, generator=generator, dtype=torch.float64)
    return (cumulative < uniform[:, None]).sum(dim=1)


@pytest.mark.parametrize("name", [*FAMILIES, "gemma4"])
def test_fisher_samples_are_squared_gradients_at_labels_of_the_model(name, tokens, all_float64):
    model, tokens = make(name).double(), tokens[:3, :10]
    samples = traces(model, tokens, "fisher")
    for n, sequence in enumerate(tokens):
        labels = sampled_labels(model, sequence, seeded(3, n, 0, "labels"))
        gradients = torch.autograd.grad(loss_of(model, sequence, labels), weights_of(model))
        expected = torch.stack([9 * G.square().sum() for G in gradients])  # 9 tokens are predicted
        assert torch.allclose(samples[n], expected, rtol=1e-9)


@pytest.mark.parametrize("name", [*FAMILIES, "gemma4"])
@pytest.mark.parametrize("vocabulary", [None, torch.arange(3, 300, 7)], ids=["all", "some"])
def test_output_gradients_are_squares_at_labels_of_the_model_by_row(vocabulary, name, tokens, all_float64, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda _: 0)  # as many chunks as batches, on disk
    monkeypatch.setattr(fisher, "TOKEN_CLIP", 1.2)
    model, tokens, cut = make(name).double(), tokens[:3, :10], 0
    matrices = list(modules_of(model))
    found = fisher.output_gradients(StreamedModel(model, CPU, 2), matrices, tokens, 3, vocabulary)
    some = slice(None) if vocabulary is None else vocabulary
    expected, outputs = dict.fromkeys(matrices, 0), {}
    keep = {module: lambda Y, key=key: outputs.update({key: Y}) for key, module in modules_of(model).items()}
    for n, sequence in enumerate(tokens):
        labels = sampled_labels(model, sequence, seeded(3, n, 0, "labels"), some)
        with hooked(keep, outputs=True):
            loss = loss_of(model, sequence, labels, some)
        gradients = torch.autograd.grad(9 * loss, list(outputs.values()))
        for key, Y in zip(outputs, gradients, strict=True):
            of_tokens = [row.square() for row in Y.reshape(10, -1)]
            loud = [row for row in of_tokens if row.sum() > 1e-20]  # a token that sees only itself has none at q and k
            loudest = 1.2 * sum(row.sum() for row in loud) / len(loud)
            cut += sum(bool(row.sum() > loudest) for row in loud)
            counted = [row * min(1, loudest / row.sum()) for row in loud]
            expected[key] = expected[key] + sum(counted) / 30
    assert cut > len(matrices)
    for key in matrices:
        G = expected[key]
        even = G ** 0.7 / (G ** 0.7).mean() * G.mean()
        torch.testing.assert_close(found[key][0].double(), even, rtol=1e-5, atol=1e-12)
    for key, X in inputs_of(model, modules_of(model), tokens).items():
        torch.testing.assert_close(found[key][1].double(), X.square().mean(0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("V", [7, 512, 1300])
def test_labels_are_drawn_by_inverting_the_distribution_function(V):
    p = (3 * torch.randn(50, V)).softmax(-1)
    uniform = torch.rand(50, dtype=torch.float64).index_fill_(0, torch.tensor(1), 1).index_fill_(0, torch.tensor(2), 0)
    expected = (p.double().cumsum(-1) < uniform[:, None]).sum(1).clamp_max(V - 1)
    assert torch.equal(fisher.drawn(p, uniform), expected)


def test_tokens_that_are_not_routed_to_an_expert_do_not_count():
    energies = torch.tensor([[0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0], [0.0] * 7 + [1.0]])
    assert torch.equal(fisher._clipping(energies), torch.ones(2, 8))
    energies[0, :7] = 1
    torch.testing.assert_close(fisher._clipping(energies * 1000)[0, 7].item(), 1.0)
    energies[0, 7] = 93
    assert fisher._clipping(energies)[0].tolist() == pytest.approx([1] * 7 + [4 * 100 / 8 / 93])


def exact_gauss_newton_trace(model, key, W, sequence):
    """Tr Jᵀ (diag p − p pᵀ) J, mean over the predicted tokens, from the Jacobian of all logits."""
    def logits(W):
        return torch.func.functional_call(model, {key: W}, sequence[None]).logits[0, :-1]

    J = torch.autograd.functional.jacobian(logits, W.detach()).flatten(2)  # (T − 1, vocabulary, weights)
    p = logits(W).softmax(-1)
    F = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("tvw,tvu,tuw->t", J, F, J).mean().item()


def test_fisher_is_the_exact_gauss_newton_trace_within_its_standard_error(minute, all_float64):
    sequence = torch.randint(0, 11, (6,))
    matrices = list(modules_of(minute))
    samples = traces(minute, sequence.expand(4000, -1), "fisher", batch_size=500)
    error = samples.std(dim=0) / len(samples) ** 0.5
    for (_, name), W, mean, se in zip(matrices, weights_of(minute), samples.mean(dim=0), error, strict=True):
        exact = exact_gauss_newton_trace(minute, f"model.decoder.layers.0.{name}.weight", W, sequence)
        assert abs(mean.item() - exact) < 4 * se.item(), name
        assert se < 0.1 * exact, name


def test_signs_are_balanced_and_independent():
    Z = hutchinson.signs(torch.Size([257, 63]), seeded(0), torch.float64)
    assert set(Z.unique().tolist()) == {-1.0, 1.0}
    assert abs(Z.mean()) < 4 / Z.numel() ** 0.5
    off = (Z.T @ Z / len(Z)).fill_diagonal_(0)
    assert off.abs().max() < 5 / len(Z) ** 0.5
