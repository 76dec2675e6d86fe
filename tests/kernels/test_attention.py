"""Check the CPU's attention against softmax written in float64, and against transformers' own."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, make
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mixgpt.allocation.fisher import output_gradients
from mixgpt.kernels import attention as module
from mixgpt.kernels.attention import attend, fast_attention
from mixgpt.pruning.distill import dense_states, distill
from mixgpt.pruning.targets import select
from modelutils import StreamedModel

B, T, D = 3, 17, 8
CAUSAL = SimpleNamespace(is_causal=True, num_key_value_groups=1)


@pytest.fixture(autouse=True)
def fast_bfloat16(monkeypatch):
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)


def inputs(heads, key_heads, dtype=torch.bfloat16, T=T, S=None):
    """Return query, key and value as models pass them: views of (B, T, heads, d)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, length, count, D, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
            for count, length in ((heads, T), (key_heads, S or T), (key_heads, S or T))]


def exact(query, key, value, scale):
    query, key, value = (each.double() for each in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    scores = query @ key.mT * scale
    S = key.shape[2]
    later = torch.arange(S) > torch.arange(S - query.shape[2], S)[:, None]
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def module_of(query, key):
    return SimpleNamespace(is_causal=True, num_key_value_groups=query.shape[1] // key.shape[1])


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_output_and_gradients_in_bfloat16(key_heads, scale, monkeypatch):
    monkeypatch.delattr(module, "sdpa_attention_forward")  # not used here
    given = inputs(6, key_heads)
    output, weights = attend(module_of(*given[:2]), *given, None, scaling=scale, dropout=0.0)
    wanted = exact(*given, D ** -0.5 if scale is None else scale)
    assert weights is None and output.dtype == torch.bfloat16 and output.is_contiguous()
    torch.testing.assert_close(output.double(), wanted, rtol=0.02, atol=0.02)
    g = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, wanted = (torch.autograd.grad(each, given, g.to(each.dtype)) for each in (output, wanted))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_one_new_token_reads_all_keys(key_heads):
    given = inputs(6, key_heads, torch.float32, T=1, S=T)
    with torch.no_grad():
        output, _ = attend(module_of(*given[:2]), *given, None)
    torch.testing.assert_close(output.double(), exact(*given, D ** -0.5), rtol=1e-5, atol=1e-5)


CASES = {
    "mask": ({}, {"attention_mask": torch.ones(T, T, dtype=torch.bool).tril()}),
    "dropout": ({}, {"dropout": 0.5}),
    "not causal": ({}, {"is_causal": False}),
    "bias": ({}, {"position_bias": torch.randn(1, 6, T, T).bfloat16()}),
    "float32": ({"dtype": torch.float32}, {}),
    "new tokens": ({"T": 3, "S": T}, {}),
    "long": ({"T": 513}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_everything_else_is_left_to_transformers(case, monkeypatch):
    tensors, more = CASES[case]
    given, more = inputs(6, 6, **tensors), {"attention_mask": None} | more
    torch.manual_seed(0)
    wanted, _ = sdpa_attention_forward(CAUSAL, *given, **more)
    torch.manual_seed(0)
    found, _ = attend(CAUSAL, *given, **more)
    assert torch.equal(found, wanted)


def test_without_gradients_scores_are_not_rounded():
    given = inputs(6, 6)
    with torch.no_grad():
        assert torch.equal(attend(CAUSAL, *given, None)[0], sdpa_attention_forward(CAUSAL, *given, None)[0])


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "qwen3-moe"])
def test_a_model_attends_so_within_the_block_only(family, monkeypatch):
    _, model = make(family)
    model.bfloat16()
    calls, causal = [], module._causal
    monkeypatch.setattr(module, "_causal", lambda *given: calls.append(0) or causal(*given))
    tokens, kind = torch.randint(0, 90, (2, 9)), model.config._attn_implementation
    wanted = model(tokens).logits.detach()
    with pytest.raises(KeyError), fast_attention(model, CPU):
        assert model.config._attn_implementation == ("mixgpt_cpu" if kind == "sdpa" else kind)
        found = model(tokens).logits.detach()
        raise KeyError
    assert bool(calls) == (kind == "sdpa")
    assert model.config._attn_implementation == kind
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())
    with fast_attention(model, torch.device("cuda")):
        assert model.config._attn_implementation == kind


@pytest.mark.parametrize("work", ["gradients", "distillation"])
def test_best_attends_so_where_it_needs_gradients(work, monkeypatch):
    family, model = make("llama")
    streamed, calls, causal = StreamedModel(model.bfloat16(), family, CPU, 2), [], module._causal
    monkeypatch.setattr(module, "_causal", lambda *given: calls.append(0) or causal(*given))
    chosen, tokens = list(select(model, family)), torch.randint(0, 90, (2, 9))
    if work == "gradients":
        output_gradients(streamed, chosen, tokens, 0)
    else:
        distill(streamed, dict.fromkeys(chosen), tokens, dense_states(streamed, tokens), 0)
    assert len(calls) == len(streamed.layers)
