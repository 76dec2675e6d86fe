"""Check triangular inverses against full ones, and products of limited precision against float64."""

import platform

import pytest
import torch
from test_sparsegpt import random

from mixgpt.common.runtime import multiplies_bfloat16
from mixgpt.kernels.linalg import rough_product_with, upper_blocks, upper_inverse


@pytest.mark.parametrize("n", [1, 130, 300, 511])
def test_the_inverse_of_a_triangular_matrix(n):
    R = (torch.eye(n) + random(n, n) / 3 / n ** 0.5).triu()
    torch.testing.assert_close(upper_inverse(R.float()).double(), torch.linalg.inv(R), rtol=0, atol=1e-5)


def test_blocks_of_a_gpu_are_wide_and_all_blocks_cover_the_columns():
    assert [len(upper_blocks(n, torch.device("cuda"))) for n in (768, 2048, 4096, 11008, 12288, 49152)] == [
        1, 1, 2, 6, 6, 8]
    for device in (torch.device("cuda"), torch.device("cpu")):
        for n in (1, 100, 2050, 4096, 11008):
            blocks = upper_blocks(n, device)
            assert [column for B in blocks for column in range(B.start, B.stop)] == list(range(n))


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
