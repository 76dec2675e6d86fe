"""Check the errors that are reported against products with the Hessian."""

from dataclasses import replace

import makebelieve
import pytest
import torch
from test_sparsegpt import correlated_inputs, random

from mixgpt.app.choices import SOLVERS
from mixgpt.pruning.solvers import Recipe, prune_in_place, walk
from quant import Scheme
from sparsegpt import SparseGPT, WalkOptions, relative_error


def pruned_on(device, dtype, recipe, target=(0.5,), shift=None, order=None):
    """Prune two matrices on a device. Returns (their weights before, after, the Hessian in float64, their errors)."""
    X, weights = correlated_inputs(300, 96).float(), [random(40, 96, seed=3).to(dtype), random(24, 96).to(dtype)]
    pruned, order = [W.to(device, copy=True) for W in weights], None if order is None else order.to(device)
    hessian = SparseGPT(96, 1, device)
    hessian.add_batch(X.to(device), shift=None if shift is None else shift.to(device))
    hessian.factor(0.01, order)
    errors = [error for error, _ in prune_in_place(hessian, pruned, [target] * 2, recipe)]
    return weights, [W.cpu() for W in pruned], (X.double().t() @ X.double()), [error.item() for error in errors]


@pytest.mark.parametrize("device, dtype, digits", [("cpu", torch.float32, 1e-6), ("cpu", torch.bfloat16, 1e-6),
                                                   ("cuda:0", torch.float32, 1e-6), ("cuda:0", torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("target", [(0.5,), (0.0, 2, 4)])
@pytest.mark.parametrize("ordered", [False, True])
def test_the_error_that_the_walk_knows_is_that_of_a_product_with_the_hessian(device, dtype, digits, target, ordered):
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)) if ordered else None
    with makebelieve.Gpu():
        before, after, H, errors = pruned_on(device, dtype, Recipe(), target, order=order)
    expected = [relative_error(W.double(), Y.double(), H) for W, Y in zip(before, after, strict=True)]
    assert errors == pytest.approx(expected, rel=digits)


@pytest.mark.parametrize("solver, wbits, shifted", [("obs", 16, True), ("admm", 16, False), ("admm", 4, False),
                                                    ("obs", 4, False)])
def test_errors_of_other_targets_and_solvers_are_those_of_products(solver, wbits, shifted):
    shift = 0.3 * random(300, 96, seed=8).float() if shifted else None
    recipe = Recipe(SOLVERS[solver].load(), WalkOptions(scheme=Scheme(wbits) if wbits < 16 else None))
    with makebelieve.Gpu():
        before, after, H, errors = pruned_on("cuda:0", torch.float32, recipe, shift=shift)
    expected = [relative_error(W.double(), Y.double(), H) for W, Y in zip(before, after, strict=True)]
    assert errors == pytest.approx(expected, rel=1e-4)


def test_a_solver_need_not_know_its_loss():
    def plain(problem):
        return [(W, grid) for W, grid, _ in walk(problem)]

    (*_, known), (*_, measured) = (pruned_on("cpu", torch.float32, replace(Recipe(), solver=solver))
                                   for solver in (walk, plain))
    assert known == pytest.approx(measured, rel=1e-6)
