"""Check products by oneDNN against float64, and linears in a model against PyTorch's own, with their derivatives."""

import platform

import makebelieve
import pytest
import torch

from mixgpt.kernels import matmul
from mixgpt.kernels.matmul import fast_linears, times_transposed

needs_onednn = pytest.mark.skipif(not matmul.AVAILABLE, reason="needs a CPU with AVX-512 and oneDNN in PyTorch")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("available", [pytest.param(True, marks=needs_onednn), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
def test_product_with_transpose(monkeypatch, available, dtype, contiguous):
    monkeypatch.setattr(matmul, "AVAILABLE", available)
    A, B, start = random(70, 300, dtype=dtype), random(50, 300, seed=1, dtype=dtype), random(70, 50, dtype=dtype)
    if not contiguous:
        A, B, start = A.t().contiguous().t(), torch.stack([B, B], 1)[:, 0], start.t().contiguous().t()
    held = start.clone()
    expected = A.double() @ B.double().t()
    torch.testing.assert_close(times_transposed(A, B).double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(times_transposed(A, B, start).double(), start.double() + expected, rtol=0, atol=1e-4)
    assert torch.equal(start, held)


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-2), (torch.float64, 1e-12)])
def test_rough_products_are_close_and_only_float32_ones_rough(dtype, digits):
    A, B = random(70, 50, dtype=dtype), random(50, 50, seed=1, dtype=dtype)
    B = B + B.t()
    multiply = matmul.rough_product_with(B)
    for scale in (1, -3):  # the second overwrites the first
        product, expected = multiply(scale * A), scale * A.double() @ B.double()
        assert product.dtype == dtype or (product.dtype, dtype) == (torch.bfloat16, torch.float32)
        assert (product.double() - expected).norm() <= digits * expected.norm()


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 3e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_fine_products_have_five_digits_on_a_gpu(dtype, digits, device):
    A, B = random(70, 500, dtype=dtype), random(500, 500, seed=1, dtype=dtype)
    B = B + B.t()
    with makebelieve.Gpu():
        found = matmul.fine_product_with(B.to(device))(A.to(device)).cpu()
    if device == "cpu":
        assert torch.equal(found, times_transposed(A, B))
    expected = A.double() @ B.double()
    error = (found.double() - expected).norm() / expected.norm()
    assert found.dtype == dtype and error <= digits
    assert error > 1e-6 or device == "cpu" or dtype == torch.float64, "it was not in bfloat16"


@pytest.mark.parametrize("instructions, limit, fast", [
    (True, "", True), (True, "AVX512_CORE_AMX", True), (True, "avx512_core", False), (False, "", False)])
def test_bfloat16_is_fast_with_instructions_that_onednn_may_use(instructions, limit, fast, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # of every CPU with AVX-512
    assert matmul.multiplies_bfloat16() == fast
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not matmul.multiplies_bfloat16()


class Counted(torch.overrides.TorchFunctionMode):
    """Count the linears that PyTorch itself runs."""

    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.nn.functional.linear
        return function(*args, **kwargs or {})


@needs_onednn
@pytest.mark.parametrize("shape, bias", [((6,), False), ((2, 6), True), ((2, 5, 6), True), ((0, 6), True)])
def test_linears_are_those_of_pytorch(shape, bias):
    linear = torch.nn.Linear(6, 3, bias=bias).requires_grad_(False)
    X = random(*shape)
    with Counted() as counted, fast_linears():
        found = linear(X)
    assert found.shape == (*shape[:-1], 3)
    assert counted.calls == (X.numel() == 0)  # an empty input is left to PyTorch
    torch.testing.assert_close(found, linear(X))
    assert counted.calls <= 1, "the block has ended"


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_linears_are_left_to_pytorch(dtype):
    linear = torch.nn.Linear(6, 3, dtype=dtype)
    with Counted() as counted, fast_linears():
        found = linear(random(2, 6, dtype=dtype))
    assert counted.calls == 1 and found.requires_grad


@needs_onednn
@pytest.mark.parametrize("trained", [("weight",), ("weight", "bias"), ("bias",), ("input", "weight"),
                                     ("input", "weight", "bias")])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 5, 6)])
def test_gradients_of_weights_and_biases_are_those_of_pytorch(shape, trained):
    linear = torch.nn.Linear(6, 3)
    X = random(*shape).requires_grad_("input" in trained)
    for name in ("weight", "bias"):
        getattr(linear, name).requires_grad_(name in trained)
    wanted_for = [X if name == "input" else getattr(linear, name) for name in trained]
    with Counted() as counted, fast_linears():
        found = linear(X).pow(3)
        gradients = torch.autograd.grad(found.sum(), wanted_for)  # of an output with strides of 0
        assert counted.calls == 0
    expected = linear(X).pow(3)
    torch.testing.assert_close(found, expected)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), wanted_for), strict=True):
        torch.testing.assert_close(gradient, wanted)


@needs_onednn
def test_transposed_weights_are_kept_until_the_end_of_the_block_and_each_its_own():
    linear = torch.nn.Linear(60, 30).requires_grad_(False)
    for _ in range(2):
        linear.weight.mul_(2)  # what a block before this one kept is gone
        with fast_linears(keep=True):
            for scale in (1, 3, 1):
                X = random(4, 60).requires_grad_()
                # the second weight is another one each time, and may lie where the one before it lay
                Y = linear(X) + torch.nn.functional.linear(X, linear.weight * scale)
                gradient, = torch.autograd.grad(Y.sum(), X)
                torch.testing.assert_close(gradient, (1 + scale) * linear.weight.sum(0).expand(4, -1))


@needs_onednn
def test_second_derivatives_with_respect_to_the_input():
    linear = torch.nn.Linear(6, 3).requires_grad_(False)
    X, v = random(4, 6).requires_grad_(), random(4, 6, seed=1)

    def curvature():
        gradient, = torch.autograd.grad(linear(X).pow(3).sum(), X, create_graph=True)
        return torch.autograd.grad((gradient * v).sum(), X)[0]

    with fast_linears():
        found = curvature()
    Y, W = linear(X).detach(), linear.weight
    torch.testing.assert_close(found, 6 * Y * (v @ W.t()) @ W)


@needs_onednn
def test_second_derivatives_with_respect_to_trained_weights():
    """As the Hutchinson estimate takes them: of the gradient's product with a probe."""
    linear, X, v = torch.nn.Linear(6, 3), random(4, 6).requires_grad_(), random(3, 6, seed=1)

    def products():
        at_W, at_X = torch.autograd.grad(linear(X).pow(3).sum(), [linear.weight, X], create_graph=True)
        return torch.autograd.grad((at_W * v).sum() + at_X.sum(), [linear.weight, linear.bias, X])

    with fast_linears():
        found = products()
    for ours, theirs in zip(found, products(), strict=True):
        torch.testing.assert_close(ours, theirs)
