"""Check the errors that are reported against products with the Hessian."""

from types import SimpleNamespace

import makebelieve
import pytest
import torch
from test_sparsegpt import correlated_inputs, random, relative_error

from mixgpt.common.choices import SOLVERS
from mixgpt.pruning import solvers
from mixgpt.pruning.hessian import InputHessian
from mixgpt.pruning.solvers import Problem, Recipe, prune_in_place, walk
from mixgpt.pruning.targets import Target
from mixgpt.quant import Scheme, quantize_nearest

HALF = Target(0.5)


def pruned_on(device, dtype, recipe, target=HALF, shift=None, order=None):
    """Prune two matrices on a device. Returns (their weights before, after, the Hessian in float64, their errors)."""
    X, weights = correlated_inputs(300, 96).float(), [random(40, 96, seed=3).to(dtype), random(24, 96).to(dtype)]
    pruned, order = [W.to(device, copy=True) for W in weights], None if order is None else order.to(device)
    hessian = InputHessian(96, 1, device)
    hessian.add_batch(X.to(device), None if shift is None else shift.to(device))
    hessian.factor(0.01, order)
    errors = [error for error, _ in prune_in_place(hessian, pruned, [target] * 2, recipe)]
    return weights, [W.cpu() for W in pruned], (X.double().t() @ X.double()), [error.item() for error in errors]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("solver, wbits, dtype, shifted, ordered", [
    ("obs", 16, torch.bfloat16, False, True), ("obs", 16, torch.float32, True, False),
    ("obs", 4, torch.float32, False, True), ("admm", 16, torch.float32, False, False),
    ("admm", 4, torch.bfloat16, False, False)])
def test_errors_are_those_of_products_with_the_hessian(solver, wbits, dtype, shifted, ordered, device):
    shift = 0.3 * random(300, 96, seed=8).float() if shifted else None
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)) if ordered else None
    recipe = Recipe(SOLVERS[solver].load(), scheme=Scheme(wbits) if wbits < 16 else None)
    with makebelieve.Gpu():
        before, after, H, errors = pruned_on(device, dtype, recipe, shift=shift, order=order)
    expected = [relative_error(W.double(), Y.double(), H) for W, Y in zip(before, after, strict=True)]
    assert errors == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("wbits, mse, ordered, most", [(3, False, False, 4), (3, True, True, 3), (4, False, False, 2),
                                                       (8, False, True, 2)])
def test_admm_meets_the_sparsity_whatever_rounding_sets_to_zero(device, wbits, mse, ordered, most, monkeypatch):
    walks, recipe = [], Recipe(SOLVERS["admm"].load(), scheme=Scheme(wbits, mse=mse))
    monkeypatch.setattr(solvers, "walk", lambda problem: walks.append(problem) or walk(problem))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)) if ordered else None
    with makebelieve.Gpu():
        _, after, *_ = pruned_on(device, torch.float32, recipe, Target(0.57), order=order)
    for W in after:
        assert (W == 0).sum() == round(0.57 * W.numel())
        assert max(len(row.unique()) for row in W) <= 2**wbits
    assert len(walks) <= most


def test_admm_leaves_as_many_weights_more_as_rounding_later_sets_to_zero():
    for W in pruned_on("cpu", torch.float32, Recipe(SOLVERS["admm"].load(), later=Scheme(3)), Target(0.4))[1]:
        rounded = (quantize_nearest(W, Scheme(3))[0] == 0).sum()
        assert (W == 0).sum() < rounded and rounded == pytest.approx(0.4 * W.numel(), rel=0.02)


def test_the_least_salient_weights_fill_up(monkeypatch):
    W, h, weights = random(5, 8).float(), torch.rand(8), torch.rand(5)
    h[3], W[:, 5] = 0, 0  # an input that is always zero, and weights that are
    monkeypatch.setattr(solvers, "walk", lambda problem: [(W, None)])
    for sparsity, count, row_weights in ((0.5, 20, None), (0.5, 20, weights), (0.1, 0, None)):  # more are zero than 0.1
        problem = Problem(SimpleNamespace(h=h), [W], [Target(sparsity)], [len(W)], Recipe(), W.dtype, row_weights)
        scores = W.square() * h * (1 if row_weights is None else weights[:, None])
        threshold = scores.flatten().sort().values[count - 1] if count else -1
        assert torch.equal(solvers.quantize(problem)[0][0], torch.where(scores <= threshold, 0, W))
