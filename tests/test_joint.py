"""Check pruning and quantization in one walk against brute force: explicit inverses, exhaustive rounding."""

import pytest
import torch
from test_sparsegpt import PERCDAMP, brute_force, correlated_inputs, damped, prune_matrix, prune_one, pruned_by, random

from mixgpt.common.choices import SOLVERS
from mixgpt.pruning.hessian import InputHessian, activation_order, factor
from mixgpt.pruning.solvers import Recipe, prune_in_place
from mixgpt.pruning.targets import Target
from mixgpt.quant import Codebooks, Scheme
from mixgpt.sparsegpt import Walk

TARGETS = [(0.0, 0, 0, 8), (0.5, 0, 0, 8), (0.5, 0, 0, 24), (0.5, 0, 0, 64), (0.0, 2, 4, 8), (0.0, 4, 8, 16)]
SCHEMES = [Scheme(2, sym=True), Scheme(2, mse=True), Scheme(3, 4, sym=True, mse=True), Scheme(4, 24),
           Scheme(8, mse=True), Scheme(8, 8), Codebooks(3, mse=True), Codebooks(4, 8)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("saliency", ["obs", "isc"])
def test_the_joint_walk_equals_brute_force_with_explicit_inverses(target, scheme, saliency):
    W, X = random(5, 48), correlated_inputs(90, 48)
    W_hat, grid = pruned_by(W, X.t() @ X, *target, saliency, scheme)
    expected, mask, loss, grids = brute_force(W, X.t() @ X, *target, saliency, scheme, W_hat)
    torch.testing.assert_close(W_hat, expected, rtol=0, atol=1e-8)
    assert (W_hat[mask] == 0).all() and not W_hat[W_hat == 0].signbit().any()
    added = 0.5 * torch.trace((W - W_hat) @ damped(X.t() @ X) @ (W - W_hat).t()).item()
    assert added == pytest.approx(loss, rel=1e-9)
    scale, zero = (torch.stack([grids[j][part] for j in range(48)], 1) for part in (0, 1))
    torch.testing.assert_close(grid.scale[:, grid.group], scale)
    assert torch.equal(grid.zero[:, grid.group].double(), zero)
    codes = grid.codes(W_hat)  # this raises if a weight does not lie on its grid
    if scheme.name == "uniform":
        assert torch.equal(codes.double(), (expected / scale).round() + zero)
    assert len(codes.unique()) > 2 and codes.max() <= 2**scheme.wbits - 1


@pytest.mark.parametrize("prunem", [0, 4])
@pytest.mark.parametrize("groupsize", [-1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_in_order_of_activations_are_put_back(prunem, groupsize, dtype):
    X = correlated_inputs(60, 24).float() * torch.linspace(0.2, 3, 24)[torch.randperm(24)]
    hessian = InputHessian(24, 1, "cpu")
    hessian.add_batch(X)
    h = hessian.H.diagonal()
    width = prunem or 1
    groups = sorted(range(24 // width), key=lambda g: -sum(h[width * g:width * (g + 1)].double()).item())
    order = torch.tensor([width * g + k for g in groups for k in range(width)])
    assert activation_order(h, prunem).tolist() == order.tolist()

    target, scheme = (0.0, 2, 4) if prunem else (0.5, 0, 0), Scheme(4, groupsize)
    weight = random(5, 24).to(dtype)
    R, _ = factor(hessian.H[order][:, order], PERCDAMP)
    walked, walked_grid = prune_matrix(weight.float()[:, order], R, h[order], Target(*target), blocksize=8,
                                       scheme=scheme, dtype=dtype)
    hessian.factor(PERCDAMP, order)
    before = weight.float().clone()
    error, grid = prune_one(hessian, weight, *target, blocksize=8, scheme=scheme)
    zeros, count = weight[:, order] == 0, max((walked == 0).sum(), 60)  # half of the weights, or more by rounding
    walked = walked.to(dtype).masked_fill(zeros, 0)  # what the walk has missed is removed
    assert zeros.sum() == count and torch.equal(weight[:, order], walked) and not torch.equal(weight, walked)
    assert torch.equal(grid.weights(grid.codes(weight)), weight)
    assert torch.equal(grid.codes(weight)[:, order], walked_grid.codes(walked))
    difference = X.double() @ (before - weight.float()).double().t()
    assert error == pytest.approx((difference**2).sum().item() / ((X.double() @ before.double().t())**2).sum().item(),
                                  rel=1e-3)


@pytest.mark.parametrize("scheme", [None, Scheme(4), Scheme(3, 8, mse=True)])
@pytest.mark.parametrize("targets", [[(0.3,), (0.71,), (0.0,)], [(0.0, 2, 4), (0.0, 1, 4), (0.0, 0, 4)]])
def test_matrices_walked_together_are_those_walked_alone(scheme, targets):
    X, matrices = correlated_inputs(90, 48), [random(out, 48, seed=out) for out in (5, 1, 12)]
    H = X.t() @ X
    R, _ = factor(H, PERCDAMP)
    targets = [Target(*target) for target in targets]
    for W, target, (together, grid) in zip(matrices, targets, Walk(
            matrices, R, H.diagonal(), targets, blocksize=16, scheme=scheme, dtype=torch.float64).run(), strict=True):
        alone, alone_grid = prune_matrix(W, R, H.diagonal(), target, blocksize=16, scheme=scheme, dtype=torch.float64)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
        assert torch.equal(together == 0, alone == 0)
        if scheme:
            torch.testing.assert_close(grid.scale, alone_grid.scale)
            assert torch.equal(grid.codes(together), alone_grid.codes(alone))


@pytest.mark.parametrize("scheme", [None, Scheme(4), Scheme(3, 4)])
@pytest.mark.parametrize("target", [(0.0, 0, 0), (0.3, 0, 0), (0.8, 0, 0), (0.0, 2, 4), (0.0, 6, 8)])
@pytest.mark.parametrize("shares", [(1.2, 0), (0, 1.2)])  # of zeros, in the first and in the last column
def test_weights_that_are_zero_stay_zero_and_count_as_pruned(shares, target, scheme):
    W, X = random(6, 48), correlated_inputs(90, 48)
    W[torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < torch.linspace(*shares, 48)] = 0
    H = X.t() @ X
    R, _ = factor(H, PERCDAMP)
    pruned, _ = prune_matrix(W, R, H.diagonal(), Target(*target), blocksize=16, scheme=scheme, dtype=torch.float64)
    assert (pruned[W == 0] == 0).all()
    sparsity, n, m = target
    assert torch.equal(pruned, W) == (scheme is None and sparsity < 0.5 and not m)
    if m:
        zeros, before = ((matrix == 0).reshape(-1, m).sum(1) for matrix in (pruned, W))
        assert (zeros >= torch.maximum(before, torch.tensor(n))).all()
        if scheme is None:
            assert torch.equal(zeros, torch.maximum(before, torch.tensor(n)))
    elif scheme is None:
        more = round(0.8 * W.numel()) if sparsity == 0.8 else (W == 0).sum()
        assert (pruned == 0).sum() == more


@pytest.mark.parametrize("sparsity", [0.99, 0.995, 0.999])
@pytest.mark.parametrize("blocksize", [1, 8])
def test_a_block_loses_no_more_weights_than_it_has(sparsity, blocksize):
    """Where fewer were rounded to 0 than foreseen, the next block has to make up for it."""
    X = correlated_inputs(200, 96).float()
    R, _ = factor(X.t() @ X, PERCDAMP)
    for seed in range(4):
        pruned, _ = prune_matrix(random(16, 96, seed=seed).float(), R, (X * X).sum(0), Target(sparsity),
                                 blocksize=blocksize, scheme=Scheme(3))
        assert (pruned == 0).sum() == pytest.approx(sparsity * 16 * 96, abs=4)


@pytest.mark.parametrize("solver, blocksize", [("obs", 32), ("obs", 128), ("admm", 64)])
@pytest.mark.parametrize("wbits, tails, groupsize", [(3, 0.0, -1), (4, 1.0, 64), (4, 0.7, 256)])
def test_pruning_and_rounding_meet_the_sparsity_together(solver, blocksize, wbits, tails, groupsize):
    """Also of weights with heavy tails, of which rounding to 4 bits sets half to 0."""
    X, scheme = correlated_inputs(900, 512).float(), Scheme(wbits, groupsize)
    hessian = InputHessian(512, 1, "cpu")
    hessian.add_batch(X)
    hessian.factor(PERCDAMP)
    matrices, targets = [random(out, 512, seed=out).float() for out in (96, 160)], [Target(0.6), Target(0.7)]
    matrices = [W * torch.exp(tails * random(*W.shape, seed=9).float()) for W in matrices]
    pruned = [W.clone() for W in matrices]
    prune_in_place(hessian, pruned, targets, Recipe(SOLVERS[solver].load(), blocksize, scheme=scheme))
    for W, target in zip(pruned, targets, strict=True):
        assert 0 <= (W == 0).sum().item() - round(target.sparsity * W.numel()) <= 5e-3 * W.numel()
    rounded, _ = prune_matrix(matrices[0], hessian.R, hessian.H.diagonal(), Target(0.0), scheme=scheme)
    assert 0.3 < (rounded == 0).float().mean() < 0.6  # there is much to foresee
