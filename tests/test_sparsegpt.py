"""Check sparsegpt against brute force in float64: explicit inverses, sorted lists, errors from the inputs."""

import functools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from mixgpt.pruning.hessian import InputHessian, factor
from mixgpt.pruning.solvers import Recipe, prune_in_place
from mixgpt.pruning.targets import Target
from mixgpt.quant import Scheme
from mixgpt.sparsegpt import Walk, algorithm_1, isc_saliency, obs_saliency

SALIENCIES = {"obs": obs_saliency, "isc": isc_saliency}
PERCDAMP = 0.01
hypothesis_settings = settings(max_examples=40, deadline=None, derandomize=True, database=None)
fractions = st.one_of(st.floats(0, 1), st.integers(0, 100).map(lambda percent: percent / 100))


def random(*shape, seed=0):
    """Return a float64 tensor of normal values."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens, columns, dead=(), seed=0):
    """Return inputs (tokens, columns) with different scales and correlations; those in `dead` are always 0."""
    X = random(tokens, columns, seed=seed + 1) @ (torch.eye(columns) + 0.4 * random(columns, columns, seed=seed + 2))
    X[:, list(dead)] = 0
    return X


def damped(H, percdamp=PERCDAMP):
    """Return H + percdamp · mean(diag H) · I."""
    return H + percdamp * H.diagonal().sum() / len(H) * torch.eye(len(H), dtype=H.dtype)


def brute_force(W, H, sparsity, prunen, prunem, blocksize, saliency="obs", scheme=None, W_hat=None):
    """Walk by optimal brain surgeon with one explicit inverse a column and, with a scheme, every grid value tried.

    Returns (Ŵ, mask, the error that it adds, grids by column). Where two values are equally near, as for the largest
    weight of a symmetric grid, it goes on with that of W_hat.
    """
    score = {"obs": lambda w, h, inverse: w ** 2 / inverse,
             "isc": lambda w, h, inverse: w ** 2 * (h + 1 / inverse)}[saliency]
    rows, columns = W.shape
    inverses, W, loss = [torch.linalg.inv(damped(H)[j:, j:]) for j in range(columns)], W.clone(), 0.0
    mask, grids = torch.zeros(rows, columns, dtype=torch.bool), {}
    unit, width = prunem or blocksize, scheme.groupsize if scheme and scheme.groupsize > 0 else columns

    def least(left, right, count):
        scores = {(i, k): 0.0 if H[k, k] == 0 else score(W[i, k], H[k, k], inverses[k][0, 0]).item()
                  for i in range(rows) for k in range(left, right)}
        if not prunem:
            return sorted(scores, key=scores.get)[:count]
        return [place for i in range(rows) for group in range(left, right, prunem)
                for place in sorted(((i, k) for k in range(group, group + prunem)), key=scores.get)[:prunen]]

    for j in range(columns):
        if j % unit == 0:
            right = min(j + unit, columns)
            zeros = W[:, :j].abs() < 1e-12  # rounded to 0 or removed; as many again as in the block before are to come
            rounded = int((zeros & ~mask[:, :j])[:, -unit:].sum())
            count = round(sparsity * (rows * right)) - int(zeros.sum()) - round(rounded * (right - j) / unit)
            for i, k in least(j, right, max(count, 0) if sparsity else 0):
                mask[i, k] = True
        q = W[:, j]
        if scheme and j % width == 0:
            pruned = mask[:, j:j + width].clone()
            if width > unit:  # not all masks of the group are known: what would be pruned as things are
                pruned[:] = False
                for i, k in least(j, j + width, round(sparsity * rows * width)):
                    pruned[i, k - j] = True
            scale, zero = scheme.fit(W[:, j:j + width], pruned, torch.float64, H.diagonal()[j:j + width])
        if scheme:
            grids[j] = scale, zero
            codes = torch.arange(2**scheme.wbits).expand(rows, -1)
            values = scheme.decode(codes, zero[:, None]).double() * scale[:, None]  # (out, codes)
            distance = (values - W[:, j, None]).abs()
            distance = torch.where((values - W_hat[:, j, None]).abs() < 1e-9, distance - 1e-9, distance)
            q = values.gather(1, distance.argmin(1, keepdim=True))[:, 0]
        e = (W[:, j] - torch.where(mask[:, j], 0, q)) / inverses[j][0, 0]
        loss += 0.5 * (e ** 2).sum().item() * inverses[j][0, 0].item()
        W[:, j:] -= e[:, None] * inverses[j][0]
    return W, mask, loss, grids


def pruned_by(W, H, sparsity=0.0, prunen=0, prunem=0, blocksize=128, saliency="obs", scheme=None):
    """Return what sparsegpt makes of W with the damping of these tests, and the grids."""
    R, used = factor(H, PERCDAMP)
    assert used == PERCDAMP
    return prune_matrix(W, R, H.diagonal(), Target(sparsity, prunen, prunem), blocksize=blocksize,
                        saliency=SALIENCIES[saliency], scheme=scheme, dtype=torch.float64)


def prune_one(hessian, weight, *target, row_weights=None, **options):
    """Prune one matrix in place. Returns its error and its grid."""
    return prune_in_place(hessian, [weight], [Target(*target)], Recipe(**options), row_weights)[0]


def prune_matrix(W, R, h, target, **options):
    """Prune and quantize one matrix (out, in). Arguments are those of `Walk`. Returns Ŵ and its Grid."""
    return Walk([W], R, h, [target], **options).run()[0]


def relative_error(W, W_hat, H):
    """Return ‖(W − Ŵ) X‖² / ‖W X‖² for W, Ŵ (out, in) and the H (in, in) of X, at any scale."""
    lost, whole = (torch.linalg.vecdot(A @ H, A).sum() for A in (W - W_hat, W))
    return (lost / whole).item()


CASES = [(sparsity, 0, 0, blocksize) for sparsity in (0.13, 0.5, 0.77) for blocksize in (1, 4, 7, 24, 128)]
CASES += [(0.0, 2, 4, blocksize) for blocksize in (1, 4, 6, 8, 128)]
CASES += [(0.0, 4, 8, blocksize) for blocksize in (4, 8, 12, 20, 128)]
CASES += [(1.0, 0, 0, 7), (0.0, 1, 3, 7), (0.7, 0, 4, 8), (0.0, 0, 0, 3)]
WITH_DEAD = [(0.6, 0, 0, 8), (0.7, 0, 0, 7), (0.8, 0, 0, 128), (0.0, 2, 4, 8), (0.0, 4, 8, 20)]


@pytest.mark.parametrize("dead, sparsity, prunen, prunem, blocksize", [
    *(((), *case) for case in CASES), *(((0, 3, 9, 22, 23), *case) for case in WITH_DEAD)])
@pytest.mark.parametrize("saliency", ["obs", "isc"])
def test_prune_matrix_is_optimal_brain_surgeon_by_inverses(dead, saliency, sparsity, prunen, prunem, blocksize):
    W, X = 1 + random(5, 24).abs(), correlated_inputs(60, 24, dead)
    H = X.t() @ X
    W_hat, _ = pruned_by(W, H, sparsity, prunen, prunem, blocksize, saliency)
    expected, mask, loss, _ = brute_force(W, H, sparsity, prunen, prunem, blocksize, saliency)
    assert torch.equal(W_hat == 0, mask) and (sparsity > 0 or prunen or torch.equal(W_hat, W))
    assert mask[:, list(dead)].all()
    torch.testing.assert_close(W_hat, expected, rtol=0, atol=1e-8)
    added = 0.5 * torch.trace((W - W_hat) @ damped(H) @ (W - W_hat).t()).item()
    assert added == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("target, blocksize", [(Target(0.5), 8), (Target(0.77), 24), (Target(0.5, 2, 4), 8)])
@pytest.mark.parametrize("saliency", ["obs", "isc", "rows"])
def test_the_walk_is_algorithm_1_with_any_saliency(saliency, target, blocksize):
    """Also with one that is no factor of the columns: |w| over the sum of its row, times ‖x‖."""
    score = SALIENCIES.get(saliency, lambda W, h, u: W.abs() / W.abs().sum(1, keepdim=True) * h.sqrt())
    W, X = random(5, 24), correlated_inputs(60, 24, dead=[9])
    W[:, 2] = 0
    H = X.t() @ X
    expected = algorithm_1(W, H, target, score, blocksize, PERCDAMP)
    R, _ = factor(H, PERCDAMP)
    walked, _ = prune_matrix(W, R, H.diagonal(), target, blocksize=blocksize, saliency=score)
    assert torch.equal(walked == 0, expected == 0) and (expected == 0).sum() >= 5 * 24 // 2
    torch.testing.assert_close(walked, expected, rtol=0, atol=1e-8)


def test_one_removal_per_row_leaves_the_constrained_least_squares_optimum():
    W, X = random(30, 6), correlated_inputs(40, 6)
    H = damped(X.t() @ X)
    W_hat, _ = pruned_by(W, X.t() @ X, prunen=1, prunem=6)
    removed = set()
    for w, w_hat in zip(W, W_hat, strict=True):
        [j] = (w_hat == 0).nonzero().flatten().tolist()
        rest = slice(j + 1, 6)
        change = torch.linalg.solve(H[rest, rest], H[rest, j]) * w[j]  # minimises Δ H̃ Δᵀ where Δ_j = w_j is given
        torch.testing.assert_close(w_hat[:j], w[:j], rtol=0, atol=0)
        torch.testing.assert_close(w_hat[rest], w[rest] + change, rtol=0, atol=1e-10)
        removed.add(j)
    assert len(removed) > 2


def algorithm_1_on_grids(W, H, target, scheme):
    """Round the kept weights in algorithm 1, column by column, to grids for those that would be kept at their start."""
    W, (rows, columns), U = W.clone(), W.shape, torch.linalg.cholesky(torch.linalg.inv(damped(H)), upper=True)
    width, m, mask = scheme.groupsize if scheme.groupsize > 0 else columns, target.prunem or 1, W == 0

    def least(B):
        scores = (W[:, B] / U.diagonal()[B]).square().view(rows, -1, m)
        return (scores.argsort(2).argsort(2) < target.prunen).flatten(1)

    for i in range(columns):
        if i % m == 0:
            mask[:, i:i + m] = least(slice(i, i + m))
        if i % width == 0:
            B = slice(i, i + width)
            scale, zero = scheme.fit(W[:, B], least(B), W.dtype, H.diagonal()[B])
        codes = ((W[:, i] / scale).round() + zero).clamp(0, 2**scheme.wbits - 1)
        q = ((codes - zero) * scale).masked_fill(mask[:, i], 0)
        W[:, i:] -= ((W[:, i] - q) / U[i, i])[:, None] * U[i, i:]
        W[:, i] = q
    return W


@functools.cache
def wide_problem():
    """Return inputs (tokens, columns) of a matrix that a walk enters in several ranges, and their H, in float64."""
    X = correlated_inputs(2500, 1700)
    return X, X.t() @ X / 1000


@pytest.mark.parametrize("target, scheme", [
    (Target(0.6), None), (Target(0.5, 2, 4), None), (Target(0.0), Scheme(4)), (Target(0.0), Scheme(3, 850, mse=True)),
    (Target(0.5, 2, 4), Scheme(4, sym=True)), *((Target(0.5, 2, 4), Scheme(4, width)) for width in (100, 340))])
def test_a_wide_walk_is_algorithm_1_and_nearly_so_as_the_program_computes_it(target, scheme):
    """That is in float32, of a Hessian in several blocks, and of matrices that are walked together."""
    X, H = wide_problem()
    matrices, R = [random(24, 1700, seed=5), random(9, 1700, seed=6)], factor(H, PERCDAMP)[0]
    walked = Walk(matrices, R, H.diagonal(), [target] * 2, scheme=scheme, dtype=torch.float64).run()
    (hessian := InputHessian(1700, 2000, "cpu")).add_batch(X.float())
    hessian.factor(PERCDAMP)
    pruned = [W.float() for W in matrices]
    errors = prune_in_place(hessian, pruned, [target] * 2, Recipe(scheme=scheme))
    for W, (found, _), rough, (error, _) in zip(matrices, walked, pruned, errors, strict=True):
        exact = algorithm_1_on_grids(W, H, target, scheme) if scheme else algorithm_1(W, H, target)
        assert torch.equal(found == 0, exact == 0)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
        # A code that rounding changes bears on all columns behind it.
        assert ((rough == 0) == (exact == 0)).double().mean() > (0.95 if scheme else 0.99)
        lost, near = relative_error(W, exact, H), 1e-2 if scheme else 3e-3
        assert relative_error(W, rough.double(), H) == pytest.approx(lost, rel=near)
        assert error == pytest.approx(lost, rel=near)
