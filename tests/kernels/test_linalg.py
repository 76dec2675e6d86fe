"""Check triangular inverses against full ones, and products of limited precision against float64."""

import platform

import pytest
import torch
from test_sparsegpt import random

from mixgpt.common.runtime import multiplies_bfloat16
from mixgpt.kernels.linalg import rough_product_with


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-2), (torch.float64, 1e-12)])
def test_rough_products_are_close_and_only_float32_ones_rough(dtype, digits):
    A, B = random(70, 50).to(dtype), random(50, 50, seed=1).to(dtype)
    B = B + B.t()
    multiply = rough_product_with(B)
    product, expected = multiply(A), A.double() @ B.double()
    assert product.dtype == dtype or (product.dtype, dtype) == (torch.bfloat16, torch.float32)
    assert (product.double() - expected).norm() <= digits * expected.norm()


@pytest.mark.parametrize("instructions, limit, fast", [
    (True, "", True), (True, "AVX512_CORE_AMX", True), (True, "avx512_core", False), (False, "", False)])
def test_bfloat16_is_fast_with_instructions_that_onednn_may_use(instructions, limit, fast, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # of every CPU with AVX-512
    assert multiplies_bfloat16() == fast
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not multiplies_bfloat16()
