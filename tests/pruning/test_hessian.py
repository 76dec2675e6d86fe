"""Check the Hessian of an input, its factor and the errors it gives against explicit products and inverses."""

import makebelieve
import pytest
import torch
from test_sparsegpt import correlated_inputs, damped, prune_one, random

from mixgpt.pruning import hessian as hessians
from mixgpt.pruning.admm import rough_product_with
from mixgpt.pruning.hessian import InputHessian, activation_order, factor


@pytest.mark.parametrize("asked, depth, needed", [
    (0.0, 0.5e-4, 1e-4), (0.0, 0.5e-3, 1e-3), (0.0, 0.5e-2, 1e-2), (0.0, 0.05, 0.1), (0.0, 0.5, 1.0),
    (1e-6, 0.5e-4, 1e-4), (0.01, 0.5e-2, 0.01), (0.003, 0.005, 0.03), (0.003, 0.5, 1.0), (2.0, 1.5, 2.0)])
def test_damping_is_raised_to_the_first_step_that_suffices(asked, depth, needed):
    Q, _ = torch.linalg.qr(random(6, 6))
    eigenvalues = torch.tensor([-depth] + [(6 + depth) / 5] * 5, dtype=torch.float64)  # mean 1: needs λ > depth
    H = 3 * (Q * eigenvalues) @ Q.t()
    R, used = factor(H, asked)
    assert used == pytest.approx(needed, rel=1e-12)
    assert torch.equal(R, R.triu())
    torch.testing.assert_close(R @ R.t(), damped(H, needed), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("fault, message", [("negative", "not positive definite at percdamp 1"), ("nan", "NaN or inf"),
                                            ("inf", "NaN or inf")])
def test_a_hessian_that_no_damping_mends_is_refused(fault, message, device):
    Q, _ = torch.linalg.qr(random(6, 6))
    H = (Q * torch.tensor([-1.5] + [1.5] * 5, dtype=torch.float64)) @ Q.t()
    if fault != "negative":
        H[3, 3] = float(fault)  # as an input that is not finite leaves it
    with makebelieve.Gpu(), pytest.raises(torch.linalg.LinAlgError, match=message):
        factor(H.float().to(device), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[6], [1] * 6, [4, 2], [1, 5]])
@pytest.mark.parametrize("flat", [False, True])
def test_the_hessian_is_two_over_n_times_the_gram_matrix_whatever_the_batches(dtype, sizes, flat):
    X = correlated_inputs(6 * 9, 7).view(6, 9, 7).to(dtype)  # (N, T, in)
    hessian = InputHessian(7, 6, "cpu")
    for batch in X.split(sizes):
        hessian.add_batch(batch.flatten(0, 1) if flat else batch)
    expected = sum(2 / 6 * x.t() @ x for x in X.double())
    assert hessian.H.dtype == torch.float32
    torch.testing.assert_close(hessian.H.double(), expected, rtol=1e-5, atol=1e-4)


def on_both(columns, batches):
    """Return the objects that a CPU and a GPU make of batches [(X, options of add_batch)]."""
    hessians = [InputHessian(columns, 3, device) for device in ("cpu", "cuda:0")]
    for X, options in batches:
        for hessian in hessians:
            hessian.add_batch(X.to(hessian.device), **{name: A.to(hessian.device) for name, A in options.items()})
    return hessians


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_adds_up_what_a_cpu_does(dtype, monkeypatch):
    monkeypatch.setattr(hessians, "STRIP", 256)  # more than one block
    make = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 40, 600, generator=make).to(dtype), {
        "input_gap": torch.randn(2, 40, 600, generator=make).to(dtype),
        "output_gap": torch.randn(2, 40, 5, generator=make).to(dtype)}) for _ in range(2)]
    with makebelieve.Gpu():
        ours, theirs = on_both(600, batches)
        for hessian in (ours, theirs):
            hessian.factor(1.0)
        W = torch.randn(5, 600, generator=make)
        torch.testing.assert_close(theirs.H.cpu(), ours.H, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(theirs.optimum(W.to("cuda:0")).cpu(), ours.optimum(W), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_gpu_damps_and_prunes_as_a_cpu_does(act_order):
    X = correlated_inputs(50, 60).float() * torch.linspace(1, 3, 60)  # fewer tokens than columns
    with makebelieve.Gpu() as gpu:
        for hessian in (both := on_both(60, [(X, {})])):
            hessian.H[7] = hessian.H[:, 7] = 0
            hessian.H[7, 7] = -0.05 * hessian.H.diagonal().mean()
            order = activation_order(hessian.H.diagonal()) if act_order else None
            before = gpu.synchronisations.copy()
            assert hessian.factor(0.001, order) == 0.1
        assert sum((gpu.synchronisations - before).values()) == 3  # once per damping
        W = random(20, 60).float()
        for hessian, weight in zip(both, weights := [W.clone(), W.to("cuda:0")], strict=True):
            prune_one(hessian, weight, 0.5)
        torch.testing.assert_close(weights[1].cpu(), weights[0], rtol=1e-3, atol=1e-4)
        assert torch.equal(weights[1].cpu() == 0, weights[0] == 0)


@pytest.mark.parametrize("percdamp", [0.0, 0.01])
def test_inputs_of_zeros_give_the_identity_and_no_error(percdamp):
    hessian = InputHessian(8, 1, "cpu")
    hessian.add_batch(torch.zeros(1, 40, 8))
    assert hessian.factor(percdamp) == percdamp and torch.equal(hessian.R, torch.eye(8))
    assert prune_one(hessian, random(5, 8).float(), 0.5)[0] == 0


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-2), (torch.float64, 1e-12)])
def test_rough_products_are_close_and_only_float32_ones_rough(dtype, digits):
    A, B = random(70, 50).to(dtype), random(50, 50, seed=1).to(dtype)
    product, expected = rough_product_with(B)(A), A.double() @ B.double()
    assert product.dtype == dtype or (product.dtype, dtype) == (torch.bfloat16, torch.float32)
    assert (product.double() - expected).norm() <= digits * expected.norm()
