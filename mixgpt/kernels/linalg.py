"""Triangular factors, products with symmetric matrices, and products of 16-bit matrices."""

import torch

from mixgpt.common.runtime import float32_products, multiplies_bfloat16

STRIP = 2048  # columns of a product that occupy all of a GPU


def damping(h, percdamp):
    """Return λ = percdamp · mean(diag H), of h (in,), the diagonal of H."""
    mean = h.mean()
    return torch.where(mean > 0, percdamp * mean, 1.0)  # an all-zero input has no scale


def upper_cholesky(H, damping):
    """Return R (in, in), upper triangular with H + damping · I = R Rᵀ, and whether that is positive definite, a tensor.

    H: (in, in), symmetric; only its upper triangle is read.
    """
    damped = H.flip(0, 1)  # the Cholesky factor of the flipped matrix, flipped back, is upper triangular
    damped.diagonal().add_(damping)
    damped, info = torch.linalg.cholesky_ex(damped)
    return damped.flip(0, 1), info == 0


def upper_blocks(columns, device):
    """Return the column blocks for symmetric products; each block needs only the rows up to its end.

    Narrower blocks save little and multiply slower, on a GPU by far: there each block should occupy all of it.
    """
    width = max(STRIP if device.type == "cuda" else 192, columns // 8)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def add_product(total, A, B):
    """Add A B to `total` (m, n), float32 on a GPU, in place: exact products, float32 sums.

    A: (m, k). B: (k, n). Where both have one 16-bit dtype they are multiplied as they are, else in float32.
    """
    if A.dtype != B.dtype or A.dtype not in (torch.bfloat16, torch.float16):
        total.addmm_(A.float(), B.float())
    else:
        total.add_(torch.mm(A, B, out_dtype=torch.float32))


def rough_product_with(B):
    """Return a function A (m, k) ↦ A B, B (k, n), good to about three digits: all in bfloat16 where that is fast."""
    fast = B.is_cuda or (B.device.type == "cpu" and multiplies_bfloat16())
    if not fast or B.dtype != torch.float32:
        return lambda A: A @ B
    B = B.bfloat16()
    return lambda A: A.bfloat16() @ B


def exact_bfloat16(dtype):
    """Allow float32 products on bfloat16 hardware (AMX) if they are exact: if the values' own dtype is bfloat16."""
    return float32_products("bf16" if dtype == torch.bfloat16 else "ieee", torch.backends.mkldnn)
