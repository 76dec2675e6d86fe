"""Matrix products: float32 ones on the CPU by oneDNN, and float32 sums of 16-bit ones on a GPU.

PyTorch's default on the CPU, MKL, uses AVX-512 only on Intel processors; oneDNN, which PyTorch ships alongside, uses it
on others too, at about twice MKL's speed there. Both compute in float32.
"""

import contextlib
import functools

import torch
from torch.overrides import TorchFunctionMode

from mixgpt.common.runtime import multiplies_bfloat16

AVAILABLE = (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
             and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def suits(*tensors):
    """Return whether oneDNN multiplies these tensors faster."""
    return AVAILABLE and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


def times_transposed(A, B, start=None):
    """Return A Bᵀ, or start + A Bᵀ. A: (m, k). B: (n, k). start: (m, n). Contiguous tensors are not copied."""
    if not suits(A, B):
        return A @ B.t() if start is None else torch.addmm(start, A, B.t())
    A, B = A.contiguous(), B.contiguous()  # with other strides oneDNN is orders of magnitude slower
    if start is None:
        return torch.ops.mkldnn._linear_pointwise(A, B, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(A, start.contiguous(), B, None, "add")


def add_product(total, A, B):
    """Add A B to `total` (m, n), float32 on a GPU, in place: exact products, float32 sums.

    A: (m, k). B: (k, n). Where both have one 16-bit dtype they are multiplied as they are, else in float32.
    """
    if A.dtype != B.dtype or A.dtype not in (torch.bfloat16, torch.float16):
        total.addmm_(A.float(), B.float())
    elif accumulates(A.dtype, A.device):
        torch.addmm(total, A, B, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(A, B, out_dtype=torch.float32))


@functools.cache
def accumulates(dtype, device):
    """Return whether PyTorch adds products of 16-bit matrices to float32 ones on a GPU, by trying it once.

    The first versions with `out_dtype` want all three in 16 bit.
    """
    A, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, A, A, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def rough_product_with(B):
    """Return a function A (m, k) ↦ A B, B (k, n) symmetric, good to about three digits: in bfloat16 where fast.

    It takes A of one shape only, and each result overwrites the one before; it may be in bfloat16.
    """
    fast = B.is_cuda or (B.device.type == "cpu" and multiplies_bfloat16())
    if not fast or B.dtype != torch.float32:
        return lambda A: times_transposed(A, B)
    B, buffers = B.bfloat16(), []

    def multiply(A):
        if not buffers:
            buffers.extend(torch.empty_like(A, dtype=torch.bfloat16) for _ in range(2))
        return torch.mm(buffers[0].copy_(A), B, out=buffers[1])

    return multiply


def fine_product_with(B):
    """Return a function A (m, k) ↦ A B, B (k, n) symmetric, good to about five digits: on a GPU in bfloat16.

    Float32 values are split into two bfloat16 ones each, and of the four products the least is left out: on an H100
    three bfloat16 products take a fifth of the time of one in float32.
    """
    if not B.is_cuda or B.dtype != torch.float32:
        return lambda A: times_transposed(A, B)
    high, low = _split(B)

    def multiply(A):
        product, (most, least) = torch.zeros(len(A), B.shape[1], device=B.device), _split(A)
        for left, right in ((least, high), (most, low), (most, high)):
            add_product(product, left, right)
        return product

    return multiply


def _split(A):
    """Return two bfloat16 matrices whose sum is A, float32, but for a relative 2⁻¹⁷."""
    high = A.bfloat16()
    return high, (A - high).bfloat16()


@contextlib.contextmanager
def exact_bfloat16(dtype):
    """Allow float32 products of values from `dtype` on bfloat16 hardware (AMX), if that is exact.

    It is for bfloat16 values, with float32 sums. dtype: original dtype of the values, or None.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # PyTorch ≥ 2.9
    if matmul is None or dtype != torch.bfloat16:
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Linear(torch.autograd.Function):
    """A linear map with constant weights, differentiable any number of times with respect to its input."""

    @staticmethod
    def forward(ctx, X, W, bias, transposed):
        """transposed: dict that keeps Wᵀ once it was needed, or None."""
        ctx.save_for_backward(W)
        ctx.transposed = transposed
        return torch.ops.mkldnn._linear_pointwise(X, W, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        W, = ctx.saved_tensors
        _, transposed = (ctx.transposed or {}).get(W.data_ptr()) or (W, W.t().contiguous())
        if ctx.transposed is not None:
            ctx.transposed[W.data_ptr()] = W, transposed  # W too, so that no other tensor takes its place
        return _Linear.apply(gradient.contiguous(), transposed, None, None), None, None, None


class _TrainedLinear(torch.autograd.Function):
    """A linear map, differentiable any number of times, with respect to its weight and bias, too."""

    @staticmethod
    def forward(ctx, X, W, bias):
        ctx.save_for_backward(X, W)
        return torch.ops.mkldnn._linear_pointwise(X, W, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        (X, W), rows = ctx.saved_tensors, gradient.reshape(-1, gradient.shape[-1])
        at_X, at_W, at_bias = ctx.needs_input_grad
        multiply = _product if torch.is_grad_enabled() else times_transposed  # for second derivatives
        return (multiply(rows, W.t()).view_as(X) if at_X else None,
                multiply(rows.t(), X.reshape(-1, X.shape[-1]).t()) if at_W else None,
                rows.sum(0) if at_bias else None)


def _product(A, B):
    return A @ B.t()


class _Linears(TorchFunctionMode):
    """Run `torch.nn.functional.linear` through oneDNN where that is faster."""

    def __init__(self, keep):
        super().__init__()
        self.transposed = {} if keep else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear and not kwargs:
            X, W, bias = (*args, None)[:3]
            if suits(*(x for x in (X, W, bias) if x is not None)) and W.is_contiguous() and X.numel():
                if torch.is_grad_enabled() and (W.requires_grad or bias is not None and bias.requires_grad):
                    return _TrainedLinear.apply(X, W, bias)
                return _Linear.apply(X, W, bias, self.transposed)
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def fast_linears(keep=False):
    """Run linears through oneDNN within the block, or in the decorated function, where that is faster.

    keep: hold the transposed weights that a backward pass needs until the end of the block, for the next batches; the
    weights must not change. Do not switch greenlets out of the block: wrap all of them.
    """
    with _Linears(keep) if AVAILABLE else contextlib.nullcontext():
        yield
