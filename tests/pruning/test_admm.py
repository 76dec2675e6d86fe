"""Check masks by ADMM and the solution for the kept weights against exact least squares and the walk."""

import pytest
import torch
from conftest import CPU
from test_sparsegpt import correlated_inputs, damped, random

from mixgpt.common.choices import SOLVERS
from mixgpt.pruning.admm import ITERATIONS, RAMP, SAMPLE, admm_pruner, admm_scores, prune_masks
from mixgpt.pruning.hessian import InputHessian
from mixgpt.pruning.solvers import Recipe, prune_in_place
from mixgpt.pruning.targets import Target
from mixgpt.quant import Scheme

HALF = Target(0.5)


def pruned(W, H, *targets, weights=None):
    """Return what ADMM makes of matrices, each with its target."""
    return admm_pruner(W, H, list(targets), weights)(list(targets))


@pytest.fixture
def problem():
    """Weights (24, 32), and inputs as those of language models: correlated, of very different scales."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    X = X * torch.randn(32, generator=generator).exp()
    return torch.randn(24, 32, generator=generator).double(), X.double()


def normalised(X, percdamp=0.01):
    H = X.T @ X / len(X)
    H.diagonal().add_(percdamp * H.diagonal().mean())
    scale = H.diagonal().sqrt()
    return H / scale / scale[:, None], scale


def seen(X, **gaps):
    """Return the factored Hessian of inputs (tokens, in)."""
    hessian = InputHessian(32, 4, CPU)
    for half in (slice(0, 150), slice(150, 400)):
        hessian.add_batch(X[half], **{name: gap[half] for name, gap in gaps.items()})
    hessian.factor(0.01)
    return hessian


def smallest(scores, target, fraction=1.0):
    """Mark a fraction of the target's smallest scores (out, in), by sorting."""
    groups = scores.view(-1, target.prunem) if target.prunem else scores.view(1, -1)
    count = round(fraction * (target.prunen or target.sparsity * scores.numel()))
    return (groups.argsort(1).argsort(1) < count).view(scores.shape)


def published_admm(W, H, target, row_weights):
    """Return |W + V| and W + V as the recursion of arXiv 2401.02938 (ρ = 1) leaves them, one matrix at a time."""
    inverse, S = torch.linalg.inv(H + torch.eye(len(H))), W
    for t in range(1, ITERATIONS):
        scores = (S.abs() * row_weights.sqrt()[:, None]).masked_fill(W == 0, -1)
        Z = S.masked_fill(smallest(scores, target, 1 - (1 - min(t, RAMP) / RAMP) ** 3) | (W == 0), 0)
        V = S - Z
        S = (W @ H + Z - V) @ inverse + V
    return (S.abs() * row_weights.sqrt()[:, None]).masked_fill(W == 0, -1), S


def conjugate_gradients(A, b, x, steps):
    """Take steps towards A x = b from x."""
    r = p = b - A @ x
    for _ in range(steps):
        x, before = x + r @ r / (p @ A @ p) * p, r
        r = b - A @ x
        p = r + r @ r / (before @ before) * p
    return x


@pytest.mark.parametrize("targets", [[Target(0.5), Target(0.7)], [Target(0.5, 2, 4), Target(0.25, 1, 4)]])
def test_scores_and_kept_weights_are_those_of_the_published_recursion_and_three_conjugate_gradients(targets):
    X, row_weights = correlated_inputs(1500, 700) * torch.linspace(-2, 2, 700).exp(), random(60, seed=4).exp()
    W, H = random(60, 700).masked_fill(random(60, 700, seed=3) < -1.3, 0), damped(X.T @ X / 1500)
    scale, counts = H.diagonal().sqrt(), [40, 20]
    H_, W_ = H / scale / scale[:, None], W * scale
    scores, reached = (of.split(counts) for of in admm_scores(W_, H_, counts, targets, row_weights))
    found = admm_pruner(list(W.split(counts)), H, targets, row_weights)(targets)
    for i, (of_w, weights) in enumerate(zip(W_.split(counts), row_weights.split(counts), strict=True)):
        exact, values = published_admm(of_w, H_, targets[i], weights)
        torch.testing.assert_close(scores[i], exact, rtol=0, atol=1e-10)
        torch.testing.assert_close(reached[i], values, rtol=0, atol=1e-10)
        assert torch.equal(found[i] == 0, gone := smallest(exact, targets[i]) | (of_w == 0))
        for row, wanted, x, kept in zip(found[i] * scale, of_w, values, ~gone, strict=True):
            fitted = conjugate_gradients(H_[kept][:, kept], H_[kept] @ wanted, x[kept], steps=3)
            torch.testing.assert_close(row[kept], fitted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fraction", [0.1, 0.6, 1.0])
def test_thresholds_of_large_matrices_are_those_of_a_sample_of_all_rows_and_columns(fraction):
    """As scores are not alike in rows, nor in even and odd columns. Allowed: 4 standard errors of a random sample."""
    scores = torch.randn(240, 640, generator=torch.Generator().manual_seed(0)).abs()
    scores *= torch.linspace(0.2, 4, 240)[:, None] * torch.tensor([1.0, 5.0]).repeat(320)
    mask, = prune_masks([scores], [Target(0.5)], [240], fraction)
    share = 0.5 * fraction
    assert scores[mask].max() <= scores[~mask].min() and scores.numel() > 2 * SAMPLE
    assert mask.double().mean() == pytest.approx(share, abs=4 * (share * (1 - share) / SAMPLE) ** 0.5)


@pytest.mark.parametrize("target, most", [(HALF, 0.5), (Target(0.5, 2, 4), 0.65)])
def test_errors_are_far_below_those_of_one_walk(problem, target, most):
    (W, X), errors = problem, []
    for solver in ("obs", "admm"):
        errors += prune_in_place(seen(X.float()), [W.float()], [target], Recipe(SOLVERS[solver].load()))
    assert errors[1][0] < most * errors[0][0]


def test_weights_that_are_zero_stay_zero_also_beyond_the_target(problem):
    W, X = problem
    H, _ = normalised(X)
    W = W.masked_fill(torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.6, 0)
    few, more, groups = (pruned([W], H, target)[0] == 0 for target in (Target(0.5), Target(0.75), Target(0.5, 2, 4)))
    assert torch.equal(few, W == 0)
    assert more.sum() == round(0.75 * W.numel()) and more[W == 0].all()
    assert torch.equal(groups.view(-1, 4).sum(1), (W == 0).view(-1, 4).sum(1).clamp_min(2))


@pytest.mark.parametrize("solver", ["obs", "admm"])
def test_rows_keep_more_where_they_weigh_more_and_their_solutions_do_not_change(problem, solver):
    W, X = problem
    weights = torch.ones(24)
    weights[:12] = 16.0
    roots, hessian = weights.sqrt()[:, None], seen(X.float())
    plain, weighted, scaled = W.float(), W.float(), W.float() * roots  # the last: the same problem, told by the weights
    zero = W.float()  # as of an expert without tokens: no row weighs more
    for weight, more in ((plain, None), (weighted, weights), (scaled, None), (zero, torch.zeros(24))):
        prune_in_place(hessian, [weight], [Target(0.5)], Recipe(SOLVERS[solver].load()), more)
    assert (weighted[:12] != 0).sum() > (plain[:12] != 0).sum() + 12
    assert torch.allclose(scaled / roots, weighted, atol=1e-3) and torch.allclose(zero, plain)


def test_admm_prunes_the_same_in_any_order_of_the_walk(problem):
    W, X = problem
    hessian, pruned = seen(X.float()), [W.float(), W.float()]
    for weight, order in zip(pruned, (None, torch.arange(32) * 5 % 32), strict=True):
        hessian.factor(0.01, order)
        prune_in_place(hessian, [weight], [HALF], Recipe(SOLVERS["admm"].load()))
    assert (pruned[0] - pruned[1]).norm() < 0.05 * pruned[0].norm()  # few masks differ where products are rough


@pytest.mark.parametrize("solver, target, scheme", [
    ("obs", HALF, None), ("admm", HALF, None), ("admm", Target(0.5, 2, 4), None), ("admm", HALF, Scheme(4))])
def test_columns_without_input_are_free_to_prune(problem, solver, target, scheme):
    W, X = problem
    X = X.float().clone()
    X[:, 3] = 0
    weight, recipe = W.float(), Recipe(SOLVERS[solver].load(), scheme=scheme)
    (_, grid), = prune_in_place(seen(X, input_gap=torch.full_like(X, 0.01)), [weight], [target], recipe)
    assert weight.isfinite().all() and (weight[:, 3] == 0).all()
    assert abs((weight == 0).sum() - 12 * 32) <= (2 if scheme else 0)
    assert torch.equal(grid.weights(grid.codes(weight)), weight) if scheme else grid is None


@pytest.mark.parametrize("names", [["input_gap"], ["output_gap"], ["input_gap", "output_gap"]])
def test_outputs_with_gaps_are_met_by_the_ridge_solution(problem, names):
    W, X = problem
    generator = torch.Generator().manual_seed(2)
    W[torch.rand(W.shape, generator=generator) < 0.3] = 0  # of a model that has been pruned: they stay
    gaps = {"input_gap": torch.randn(X.shape, generator=generator),
            "output_gap": 3 * torch.randn(len(X), len(W), generator=generator)}
    gaps = {name: gaps[name] for name in names}
    hessian = seen(X.float(), **gaps)
    hessian.factor(0.01, torch.randperm(32, generator=generator))
    ridge = (0.01 * hessian.H.diagonal().mean().double()).sqrt()
    outputs = (X + gaps.get("input_gap", 0)) @ W.T + gaps.get("output_gap", 0)
    exact = torch.linalg.lstsq(torch.cat([(2 / 4) ** 0.5 * X, ridge * torch.eye(32, dtype=torch.float64)]),
                               torch.cat([(2 / 4) ** 0.5 * outputs, ridge * W.T])).solution.T
    found = hessian.optimum(W.float()).double()[:, hessian.inverse_order]
    assert torch.allclose(found, exact.masked_fill(W == 0, 0), rtol=1e-3, atol=1e-3) and (found[W == 0] == 0).all()
    assert not torch.allclose(exact, W, atol=0.05)
