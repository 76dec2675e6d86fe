"""Check triangular inverses against full ones, and products of limited precision against float64."""


import pytest
import torch
from test_sparsegpt import random

from mixgpt.kernels.linalg import rough_product_with


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-2), (torch.float64, 1e-12)])
def test_rough_products_are_close_and_only_float32_ones_rough(dtype, digits):
    A, B = random(70, 50).to(dtype), random(50, 50, seed=1).to(dtype)
    B = B + B.t()
    multiply = rough_product_with(B)
    product, expected = multiply(A), A.double() @ B.double()
    assert product.dtype == dtype or (product.dtype, dtype) == (torch.bfloat16, torch.float32)
    assert (product.double() - expected).norm() <= digits * expected.norm()
