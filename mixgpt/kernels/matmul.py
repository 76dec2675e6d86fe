"""Matrix products of float32 on a CPU by oneDNN, which PyTorch brings along beside MKL, its default for them.

MKL takes AVX-512 on Intel's processors only; oneDNN takes it wherever it is, at about twice MKL's speed there. Both
compute in float32.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

AVAILABLE = (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
             and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def suits(*tensors):
    """Say whether oneDNN multiplies these tensors faster."""
    return AVAILABLE and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


def times_transposed(A, B, start=None):
    """Return A Bᵀ, or start + A Bᵀ. A: (m, k). B: (n, k). start: (m, n). Contiguous ones are not copied."""
    if not suits(A, B):
        return A @ B.t() if start is None else torch.addmm(start, A, B.t())
    A, B = A.contiguous(), B.contiguous()  # on other strides oneDNN is slower by orders of magnitude
    if start is None:
        return torch.ops.mkldnn._linear_pointwise(A, B, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(A, start.contiguous(), B, None, "add")


def rough_product_with(B):
    """Return what multiplies A (m, k) by B (k, n), symmetric, to about three digits: in bfloat16 where that is fast."""
    fast = B.is_cuda or (B.device.type == "cpu" and torch.backends.mkldnn.is_available()
                         and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not fast or B.dtype != torch.float32:
        return lambda A: times_transposed(A, B)
    B = B.bfloat16()
    return lambda A: (A.bfloat16() @ B).float()


@contextlib.contextmanager
def exact_bfloat16(dtype):
    """Let float32 products of numbers that came from `dtype` take the units for bfloat16 (AMX), if that is exact.

    Numbers that were bfloat16 lose nothing there, and sums are float32. dtype: None where they came from none.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # from PyTorch 2.9 on
    if matmul is None or dtype != torch.bfloat16:
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Linear(torch.autograd.Function):
    """A linear map without gradients of its own, differentiable with respect to its input, any number of times."""

    @staticmethod
    def forward(ctx, X, W, bias):
        ctx.save_for_backward(W)
        return torch.ops.mkldnn._linear_pointwise(X, W, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        W, = ctx.saved_tensors
        return _Linear.apply(gradient.contiguous(), W.t().contiguous(), None), None, None


class _Linears(TorchFunctionMode):
    """Run `torch.nn.functional.linear` by oneDNN where that is faster."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear and not kwargs:
            X, W, bias = (*args, None)[:3]
            if suits(*(x for x in (X, W, bias) if x is not None)) and W.is_contiguous() and X.numel():
                if not torch.is_grad_enabled() or not (W.requires_grad or bias is not None and bias.requires_grad):
                    return _Linear.apply(X, W, bias)
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def fast_linears():
    """Run the linears of models by oneDNN within the block, or in the decorated function, where that is faster.

    Not across greenlets that are switched within the block: it belongs around all of them.
    """
    with _Linears() if AVAILABLE else contextlib.nullcontext():
        yield
