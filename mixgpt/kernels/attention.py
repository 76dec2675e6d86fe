"""Attention on a CPU where PyTorch's is slow: one new token with shared keys, and gradients in bfloat16."""

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixgpt.kernels.matmul import multiplies_bfloat16

NAME = "mixgpt_cpu"
LONGEST = 512  # tokens up to which scores that are written out are faster than PyTorch's kernel


@contextlib.contextmanager
def fast_attention(model, device):
    """Let `attend` stand in for PyTorch's attention within the block, on a CPU, if the model uses that."""
    kind = model.config._attn_implementation
    if device.type != "cpu" or kind != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(kind)


def attend(module, query, key, value, attention_mask, **more):
    """Attend as `sdpa_attention_forward` does. One new token reads keys that its heads share only once.

    Where gradients are asked for, the scores of short bfloat16 sequences are written out, rounded to bfloat16: with 128
    tokens this takes 0.4 times as long. query: (B, heads, T, d). key, value: (B, key heads, S, d). Returns
    (B, T, heads, d) and None.
    """
    B, heads, T, d = query.shape
    usual = attention_mask is None and not more.get("dropout") and all(
        more.get(name) is None for name in ("is_causal", "position_bias")) and getattr(module, "is_causal", True)
    one, short = T == 1 and key.shape[1] < heads, 1 < T == key.shape[2] <= LONGEST
    if not usual or not (one or short and torch.is_grad_enabled() and query.dtype == torch.bfloat16
                         and multiplies_bfloat16()):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    packed, scale = query.reshape(B, key.shape[1], -1, d), more.get("scaling")
    if one:
        output = torch.nn.functional.scaled_dot_product_attention(packed, key, value, scale=scale)
    else:
        output = _causal(packed, key, value, T, d ** -0.5 if scale is None else scale)
    return output.reshape(B, heads, T, d).transpose(1, 2).contiguous(), None


def _causal(query, key, value, T, scale):
    """query: (B, key heads, n, d), of the heads that share keys one after the other, each T of the n."""
    future = torch.full((T, T), -torch.inf, dtype=query.dtype).triu_(1).repeat(query.shape[2] // T, 1)
    query, key, value = (each.flatten(0, 1) for each in (query, key, value))
    scores = torch.baddbmm(future.expand(len(query), -1, -1), query, key.mT, alpha=scale)
    return scores.softmax(-1) @ value


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
