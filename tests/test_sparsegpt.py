"""Check sparsegpt against brute force in float64: explicit inverses, sorted lists, errors from the inputs."""

import makebelieve
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsegpt
from mixgpt.kernels import linalg, matmul
from mixgpt.pruning.magnitude import magnitude_prune
from mixgpt.pruning.solvers import Recipe, prune_in_place
from quant import Scheme
from sparsegpt import (
    InputHessian,
    WalkOptions,
    activation_order,
    factor,
    isc_saliency,
    obs_saliency,
    prune_matrices,
    prune_matrix,
    relative_error,
)

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


def remaining_inverses(A):
    """Return the explicit inverse of A[j:, j:] for every j."""
    return [torch.linalg.inv(A[j:, j:]) for j in range(len(A))]


def brute_force(W, H, sparsity, prunen, prunem, blocksize, saliency="obs"):
    """Prune by optimal brain surgeon with one explicit inverse a column. Returns (Ŵ, mask, ½ Σ w²/[inv]_00)."""
    score = {"obs": lambda w, h, inverse: w ** 2 / inverse,
             "isc": lambda w, h, inverse: w ** 2 * (h + 1 / inverse)}[saliency]
    rows, columns = W.shape
    inverses = remaining_inverses(damped(H))
    W, mask, loss = W.clone(), torch.zeros(rows, columns, dtype=torch.bool), 0.0
    width = prunem or blocksize
    for j in range(columns):
        if j % width == 0:
            right = min(j + width, columns)
            scores = {(i, k): 0.0 if H[k, k] == 0 else score(W[i, k], H[k, k], inverses[k][0, 0]).item()
                      for i in range(rows) for k in range(j, right)}
            if prunem:
                chosen = [place for i in range(rows)
                          for place in sorted((p for p in scores if p[0] == i), key=scores.get)[:prunen]]
            else:
                count = round(sparsity * (rows * right)) - int(mask.sum())
                chosen = sorted(scores, key=scores.get)[:count]
            for i, k in chosen:
                mask[i, k] = True
        for i in range(rows):
            if mask[i, j]:
                w, inverse = W[i, j].item(), inverses[j]
                W[i, j:] -= w / inverse[0, 0] * inverse[0]
                W[i, j] = 0
                loss += 0.5 * w ** 2 / inverse[0, 0].item()
    return W, mask, loss


def pruned_by(W, H, sparsity=0.0, prunen=0, prunem=0, blocksize=128, saliency="obs"):
    """Return what sparsegpt makes of W with the damping of these tests."""
    R, used = factor(H, PERCDAMP)
    assert used == PERCDAMP
    return prune_matrix(W, R, H.diagonal(), sparsity, prunen, prunem, blocksize=blocksize,
                        saliency=SALIENCIES[saliency])[0]


def prune_one(hessian, weight, *target, row_weights=None, **options):
    """Prune one matrix in place. Returns its error and its grid."""
    return prune_in_place(hessian, [weight], [target], Recipe(options=WalkOptions(**options)), row_weights)[0]


def explicit_error(W, W_hat, X):
    """Return ‖X (W − Ŵ)ᵀ‖² / ‖X Wᵀ‖² from the outputs themselves, in float64."""
    X, W, W_hat = X.double(), W.double(), W_hat.double()
    return (((X @ W.t() - X @ W_hat.t()) ** 2).sum() / ((X @ W.t()) ** 2).sum()).item()


def zeros_per_group(W, prunem):
    """Return the number of zeros in every prunem consecutive weights of a row."""
    return [row[left:left + prunem].count(0.0) for row in W.tolist() for left in range(0, len(row), prunem)]


# factor


@pytest.mark.parametrize("percdamp", [0.0, 0.01, 0.3, 2.0])
def test_the_factor_is_upper_triangular_and_gives_the_damped_inverse(percdamp):
    X = correlated_inputs(50, 9)
    H = X.t() @ X
    R, used = factor(H, percdamp)
    assert used == percdamp
    assert torch.equal(R, R.triu())
    torch.testing.assert_close(R @ R.t(), damped(H, percdamp), rtol=1e-9, atol=1e-12)


def test_the_squared_diagonal_of_the_factor_is_the_first_entry_of_each_remaining_inverse():
    X = correlated_inputs(50, 9)
    H = X.t() @ X
    R, _ = factor(H, PERCDAMP)
    expected = torch.stack([inverse[0, 0] for inverse in remaining_inverses(damped(H))])
    torch.testing.assert_close(1 / R.diagonal() ** 2, expected, rtol=1e-9, atol=0)


def test_the_default_damping_is_one_percent():
    X = correlated_inputs(50, 5)
    H = X.t() @ X
    R, used = factor(H)
    assert used == 0.01
    assert torch.equal(R, factor(H, 0.01)[0])


def test_a_rank_deficient_hessian_is_damped_though_none_was_asked_for():
    x = torch.tensor([[1.0, 2.0, 4.0, 1.0]], dtype=torch.float64)  # powers of 2: the pivots are 0 without rounding
    R, used = factor(x.t() @ x, 0.0)
    assert used == 1e-4
    torch.testing.assert_close(R @ R.t(), damped(x.t() @ x, 1e-4), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("asked, depth, needed", [
    (0.0, 0.5e-4, 1e-4), (0.0, 0.5e-3, 1e-3), (0.0, 0.5e-2, 1e-2), (0.0, 0.05, 0.1), (0.0, 0.5, 1.0),
    (1e-6, 0.5e-4, 1e-4), (0.01, 0.5e-2, 0.01), (0.003, 0.005, 0.03), (0.003, 0.5, 1.0), (2.0, 1.5, 2.0)])
def test_damping_is_raised_to_the_first_step_that_suffices(asked, depth, needed):
    Q, _ = torch.linalg.qr(random(6, 6))
    eigenvalues = torch.tensor([-depth] + [(6 + depth) / 5] * 5, dtype=torch.float64)  # mean 1: needs λ > depth
    H = 3 * (Q * eigenvalues) @ Q.t()
    R, used = factor(H, asked)
    assert used == pytest.approx(needed, rel=1e-12)
    torch.testing.assert_close(R @ R.t(), damped(H, needed), rtol=1e-7, atol=1e-7)


def test_a_hessian_that_no_damping_mends_is_refused():
    Q, _ = torch.linalg.qr(random(6, 6))
    H = (Q * torch.tensor([-1.5] + [1.5] * 5, dtype=torch.float64)) @ Q.t()
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite at percdamp 1"):
        factor(H, 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value):
    X = correlated_inputs(30, 4)
    X[3, 2] = value
    with pytest.raises(torch.linalg.LinAlgError, match="NaN or inf"):
        factor(X.t() @ X, PERCDAMP)
    H = torch.eye(4)
    H[0, 3] = H[3, 0] = value
    with pytest.raises(torch.linalg.LinAlgError):
        factor(H, PERCDAMP)


@pytest.mark.parametrize("percdamp", [0.0, 0.01])
def test_a_hessian_of_zeros_gives_the_identity(percdamp):
    R, used = factor(torch.zeros(5, 5), percdamp)
    assert used == percdamp
    assert torch.equal(R, torch.eye(5))


# prune_matrix against brute force

UNSTRUCTURED = [(sparsity, 0, 0, blocksize) for sparsity in (0.13, 0.5, 0.77) for blocksize in (1, 4, 7, 24, 128)]
UNSTRUCTURED += [(1.0, 0, 0, 7)]
STRUCTURED = [(0.0, 2, 4, blocksize) for blocksize in (1, 4, 6, 8, 128)]
STRUCTURED += [(0.0, 4, 8, blocksize) for blocksize in (4, 8, 12, 20, 128)] + [(0.0, 1, 3, 7), (0.7, 0, 4, 8)]


@pytest.mark.parametrize("sparsity, prunen, prunem, blocksize", UNSTRUCTURED + STRUCTURED)
@pytest.mark.parametrize("saliency", ["obs", "isc"])
def test_prune_matrix_equals_optimal_brain_surgeon_with_explicit_inverses(saliency, sparsity, prunen, prunem,
                                                                          blocksize):
    W, X = random(5, 24), correlated_inputs(60, 24)
    H = X.t() @ X
    W_hat = pruned_by(W, H, sparsity, prunen, prunem, blocksize, saliency)
    expected, mask, loss = brute_force(W, H, sparsity, prunen, prunem, blocksize, saliency)
    assert torch.equal(W_hat == 0, mask)
    torch.testing.assert_close(W_hat, expected, rtol=0, atol=1e-8)
    added = 0.5 * torch.trace((W - W_hat) @ damped(H) @ (W - W_hat).t()).item()
    assert added == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("rows, columns, blocksize", [(3, 23, 5), (7, 10, 4), (1, 17, 6), (6, 1, 4)])
def test_prune_matrix_equals_brute_force_where_the_last_block_is_narrower(rows, columns, blocksize):
    W, X = random(rows, columns, seed=3), correlated_inputs(60, columns, seed=3)
    expected, mask, _ = brute_force(W, X.t() @ X, 0.45, 0, 0, blocksize)
    W_hat = pruned_by(W.clone(), X.t() @ X, 0.45, blocksize=blocksize)
    assert torch.equal(W_hat == 0, mask)
    torch.testing.assert_close(W_hat, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("sparsity, prunen, prunem, blocksize",
                         [(0.6, 0, 0, 8), (0.7, 0, 0, 7), (0.8, 0, 0, 128), (0.0, 2, 4, 8), (0.0, 4, 8, 20)])
@pytest.mark.parametrize("saliency", ["obs", "isc"])
def test_prune_matrix_equals_brute_force_with_dead_columns(saliency, sparsity, prunen, prunem, blocksize):
    W, X = 1 + random(5, 24).abs(), correlated_inputs(60, 24, dead=(0, 3, 9, 22, 23))
    H = X.t() @ X
    expected, mask, _ = brute_force(W, H, sparsity, prunen, prunem, blocksize, saliency)
    W_hat = pruned_by(W, H, sparsity, prunen, prunem, blocksize, saliency)
    assert mask[:, [0, 3, 9, 22, 23]].all()
    assert torch.equal(W_hat == 0, mask)
    torch.testing.assert_close(W_hat, expected, rtol=0, atol=1e-8)


def test_dead_columns_are_pruned_first_and_leave_the_others_as_they_were():
    dead = [1, 2, 6, 7]
    W, X = random(6, 8), correlated_inputs(40, 8, dead)
    W[:, dead] *= 1e3
    W_hat = pruned_by(W, X.t() @ X, 0.4)
    zeros = W_hat == 0
    assert zeros.sum() == 19 and zeros[:, dead].sum() == 19
    assert torch.equal(W_hat[~zeros], W[~zeros])


def test_kept_weights_of_dead_columns_are_not_changed():
    dead = [5, 6, 7]
    W, X = random(6, 8), correlated_inputs(40, 8, dead)
    W_hat = pruned_by(W, X.t() @ X, prunen=1, prunem=4, blocksize=4)
    zeros = W_hat == 0
    assert zeros[:, :4].sum() == 6 and zeros[:, dead].sum() == 6
    assert torch.equal(W_hat[:, dead][~zeros[:, dead]], W[:, dead][~zeros[:, dead]])
    assert not torch.isclose(W_hat[:, 4], W[:, 4]).any()  # the live column beside them does compensate


@pytest.mark.parametrize("target", [{"sparsity": 0.6}, {"prunen": 2, "prunem": 4}])
def test_weights_of_dead_columns_have_no_influence_on_the_others(target):
    dead, live = [0, 5, 6], [1, 2, 3, 4, 7]
    W, X = random(6, 8), correlated_inputs(40, 8, dead)
    other = W.clone()
    other[:, dead] = 100 * random(6, 3, seed=7)
    assert torch.equal(pruned_by(W, X.t() @ X, **target)[:, live], pruned_by(other, X.t() @ X, **target)[:, live])


def test_one_removal_per_row_leaves_the_constrained_least_squares_optimum():
    W, X = random(30, 6), correlated_inputs(40, 6)
    H = damped(X.t() @ X)
    W_hat = pruned_by(W, X.t() @ X, prunen=1, prunem=6)
    removed = set()
    for w, w_hat in zip(W, W_hat, strict=True):
        [j] = (w_hat == 0).nonzero().flatten().tolist()
        rest = slice(j + 1, 6)
        change = torch.linalg.solve(H[rest, rest], H[rest, j]) * w[j]  # minimises Δ H̃ Δᵀ where Δ_j = w_j is given
        torch.testing.assert_close(w_hat[:j], w[:j], rtol=0, atol=0)
        torch.testing.assert_close(w_hat[rest], w[rest] + change, rtol=0, atol=1e-10)
        removed.add(j)
    assert len(removed) > 2


def test_the_saliency_is_the_callers_choice_and_sees_the_diagonals_of_its_columns():
    h = torch.rand(12, dtype=torch.float64) + 0.5
    W, H = random(4, 12).sign(), torch.diag(h)  # nothing to compensate: all weights stay ±1, or become 0
    R, _ = factor(H, PERCDAMP)

    def by_input(h, u):
        assert len(h) == len(u) == 12
        return h + 0 * u

    def by_factor(h, u):
        return u

    for saliency, diagonal in ((by_input, h), (by_factor, 1 / R.diagonal())):
        W_hat = prune_matrix(W, R, H.diagonal(), 0.0, 1, 4, saliency=saliency)[0]
        expected = [left + diagonal[left:left + 4].argmin().item() for left in (0, 4, 8)]
        assert (W_hat == 0).all(0).nonzero().flatten().tolist() == expected


def test_obs_saliency_is_the_squared_weight_over_the_diagonal_of_the_inverse():
    W = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, -5.0]])
    scores = W**2 * obs_saliency(torch.full((3,), float("nan")), torch.tensor([1.0, 2.0, 0.5]))
    assert scores.tolist() == [[1.0, 1.0, 36.0], [0.0, 4.0, 100.0]]


def test_isc_saliency_is_the_squared_weight_times_the_input_and_the_inverse_of_the_remaining_inverse():
    W, X = random(5, 9), correlated_inputs(50, 9)
    H = X.t() @ X
    R, _ = factor(H, PERCDAMP)
    expected = torch.stack([W[:, m] ** 2 * (H[m, m] + 1 / inverse[0, 0])
                            for m, inverse in enumerate(remaining_inverses(damped(H)))], dim=1)
    torch.testing.assert_close(W**2 * isc_saliency(H.diagonal(), 1 / R.diagonal()), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [2.0 ** -7, 2.0 ** 7])
@pytest.mark.parametrize("saliency", ["obs", "isc"])
def test_scaling_the_inputs_scales_the_scores_by_its_square_and_leaves_the_result(saliency, scale):
    # the paper's released code has 1/U_mm, of which neither holds: it is of another dimension than H_mm
    W, X = random(8, 16), correlated_inputs(60, 16)
    H, scaled = X.t() @ X, (scale * X).t() @ (scale * X)
    score = SALIENCIES[saliency]
    scores, scaled_scores = (score(A.diagonal(), 1 / factor(A, PERCDAMP)[0].diagonal()) for A in (H, scaled))
    torch.testing.assert_close(scaled_scores, scale ** 2 * scores, rtol=1e-9, atol=0)
    for target in ({"sparsity": 0.5}, {"prunen": 2, "prunem": 4}):
        W_hat, scaled_W_hat = (pruned_by(W, A, **target, saliency=saliency) for A in (H, scaled))
        assert torch.equal(scaled_W_hat == 0, W_hat == 0)
        torch.testing.assert_close(scaled_W_hat, W_hat, rtol=0, atol=1e-9)


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"prunen": 2, "prunem": 4}, {"prunen": 4, "prunem": 8}])
def test_isc_and_obs_choose_different_masks(target):
    W, X = random(5, 24), correlated_inputs(60, 24)
    obs, isc = (pruned_by(W, X.t() @ X, **target, saliency=saliency) == 0 for saliency in ("obs", "isc"))
    assert obs.sum() == isc.sum() == 60
    assert not torch.equal(obs, isc)


# counts


@hypothesis_settings
@given(rows=st.integers(1, 9), columns=st.integers(1, 20), sparsity=fractions, blocksize=st.integers(1, 25),
       seed=st.integers(0, 1000))
def test_exactly_the_wanted_number_of_weights_is_pruned(rows, columns, sparsity, blocksize, seed):
    W, X = random(rows, columns, seed=seed), correlated_inputs(40, columns, seed=seed)
    W_hat = pruned_by(W, X.t() @ X, sparsity, blocksize=blocksize)
    assert (W_hat == 0).sum() == round(sparsity * (rows * columns))


@pytest.mark.parametrize("sparsity, rows, columns", [(0.01, 35, 30), (0.02, 35, 15), (0.011, 20, 25)])
def test_the_wanted_number_is_the_same_as_magnitudes_also_halfway_between_two_counts(sparsity, rows, columns):
    W = random(rows, columns)
    H = torch.eye(columns, dtype=torch.float64)
    for W_hat in (magnitude_prune(W, sparsity), pruned_by(W, H, sparsity), pruned_by(W, H, sparsity, blocksize=7)):
        assert (W_hat == 0).sum() == round(sparsity * W.numel())


@hypothesis_settings
@given(rows=st.integers(1, 6), columns=st.integers(1, 12), sparsity=fractions, blocksize=st.integers(1, 15))
def test_exactly_the_wanted_number_is_pruned_among_equal_weights(rows, columns, sparsity, blocksize):
    W, H = torch.ones(rows, columns, dtype=torch.float64), torch.eye(columns, dtype=torch.float64)
    W_hat = pruned_by(W.clone(), H, sparsity, blocksize=blocksize)
    assert (W_hat == 0).sum() == round(sparsity * (rows * columns))
    assert torch.equal(W_hat[W_hat != 0], W[W_hat != 0])


@hypothesis_settings
@given(already=st.integers(0, 30), seed=st.integers(0, 100))
def test_weights_that_are_zero_already_count_among_the_pruned(already, seed):
    W, X = random(6, 10, seed=seed), correlated_inputs(40, 10, seed=seed)
    places = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:already]
    W.view(-1)[places] = 0
    W_hat = pruned_by(W, X.t() @ X, 0.5)
    assert (W_hat == 0).sum() == 30
    assert (W_hat.flatten()[places] == 0).all()


@hypothesis_settings
@given(rows=st.integers(1, 6), groups=st.integers(1, 4), prunem=st.integers(1, 8), blocksize=st.integers(1, 40),
       equal=st.booleans(), data=st.data())
def test_every_group_has_exactly_n_zeros(rows, groups, prunem, blocksize, equal, data):
    columns, prunen = groups * prunem, data.draw(st.integers(0, prunem), label="prunen")
    W = torch.ones(rows, columns, dtype=torch.float64) if equal else random(rows, columns)
    X = correlated_inputs(60, columns)
    W_hat = pruned_by(W, X.t() @ X, 0.9, prunen, prunem, blocksize)
    assert zeros_per_group(W_hat, prunem) == [prunen] * (rows * groups)


@pytest.mark.parametrize("target", [{"sparsity": 0.0}, {"sparsity": 0.0, "blocksize": 3},
                                    {"prunen": 0, "prunem": 4, "blocksize": 4}])
def test_sparsity_0_returns_the_weights_bit_for_bit(target):
    W, X = random(5, 12), correlated_inputs(40, 12)
    W_hat = pruned_by(W, X.t() @ X, **target)
    assert torch.equal(W_hat.view(torch.int64), W.view(torch.int64))


@pytest.mark.parametrize("make", [
    pytest.param(lambda: random(5, 12), id="row-major"),
    pytest.param(lambda: random(12, 5).t(), id="column-major"),
    pytest.param(lambda: random(5, 24)[:, ::2], id="strided"),
    pytest.param(lambda: random(1, 12), id="one row"),
    pytest.param(lambda: random(5, 1), id="one column")])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_given_weights_are_not_modified_whatever_their_layout(make, sparsity):
    W = make()
    before, X = W.tolist(), correlated_inputs(40, W.shape[1])
    W_hat = pruned_by(W, X.t() @ X, sparsity)
    assert W.tolist() == before
    W_hat.fill_(7)
    assert W.tolist() == before


@pytest.mark.parametrize("columns, prunem", [(10, 4), (12, 8), (3, 4)])
def test_a_group_size_that_does_not_divide_the_columns_is_refused(columns, prunem):
    H = torch.eye(columns, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"prunem {prunem} does not divide the {columns} columns"):
        pruned_by(random(4, columns), H, prunen=2, prunem=prunem)


# matrices so wide that oneDNN makes their factor and their walk in several panels, against float64, which LAPACK makes

WIDE = 1700


@pytest.fixture(scope="module")
def wide_hessian():
    X = correlated_inputs(2500, WIDE)
    return X.t() @ X / 1000


def test_a_wide_float32_matrix_is_factored_as_in_float64(wide_hessian):
    H = damped(wide_hessian)
    R, percdamp = factor(wide_hessian.float(), PERCDAMP)
    assert (R.dtype, percdamp) == (torch.float32, PERCDAMP)
    assert torch.equal(R, R.triu())
    assert (R.double() @ R.double().t() - H).norm() <= 1e-6 * H.norm()


@pytest.mark.parametrize("bad", [3, 700, 1690])
def test_a_wide_matrix_that_is_indefinite_in_any_panel_is_damped_more(wide_hessian, bad):
    H = wide_hessian.clone()
    H[bad] = H[:, bad] = 0
    H[bad, bad] = -0.05 * H.diagonal().mean()
    assert factor(H.float(), 0.01)[1] == factor(H, 0.01)[1] == 0.1


@pytest.mark.parametrize("target", [(0.6, 0, 0), (0.0, 2, 4)])
@pytest.mark.parametrize("wbits", [16, 4])
def test_a_wide_float32_walk_does_what_the_float64_walk_does(wide_hessian, target, wbits):
    R, _ = factor(wide_hessian, PERCDAMP)
    matrices, scheme = [random(40, WIDE, seed=5), random(9, WIDE, seed=6)], Scheme(wbits) if wbits < 16 else None
    options = WalkOptions(scheme=scheme)
    exact, found = (prune_matrices([W.to(dtype) for W in matrices], R.to(dtype), wide_hessian.diagonal().to(dtype),
                                   [target] * 2, options) for dtype in (torch.float64, torch.float32))
    for W, (X, _), (Y, _) in zip(matrices, exact, found, strict=True):
        assert ((X == 0) == (Y == 0)).double().mean() > 0.99
        assert relative_error(W, Y.double(), wide_hessian) == pytest.approx(
            relative_error(W, X, wide_hessian), rel=3e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_hessian_on_cuda_is_exact_far_below_the_damping(dtype):
    X = correlated_inputs(4096, 300).to("cuda", dtype)
    hessian = InputHessian(300, 1, "cuda")
    for batch in X.split(1024):
        hessian.add_batch(batch)
    exact = 2 * X.double().t() @ X.double()
    assert torch.linalg.matrix_norm(hessian.H.double() - exact, 2) <= 1e-3 * PERCDAMP * exact.diagonal().mean()


# the same on a GPU, here a make-believe one: sums, Hessian and factor in the memory of one matrix


def on_both(columns, batches):
    """Return the objects that a CPU and a GPU make of batches [(X, options of add_batch)]."""
    hessians = [InputHessian(columns, 3, device) for device in ("cpu", "cuda:0")]
    for X, options in batches:
        for hessian in hessians:
            hessian.add_batch(X.to(hessian.device), **{name: A.to(hessian.device) for name, A in options.items()})
    return hessians


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_gpu_adds_up_what_a_cpu_does(dtype, weighted, monkeypatch):
    monkeypatch.setattr(sparsegpt, "multiplies_bfloat16", lambda: False)  # which rounds the sums of a batch
    monkeypatch.setattr(linalg, "STRIP", 256)  # more than one block
    make = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 40, 600, generator=make).to(dtype), {
        "shift": torch.randn(2, 40, 600, generator=make).to(dtype),
        "gain": torch.randn(2, 40, 5, generator=make).to(dtype)}) for _ in range(2)]
    for _, options in batches if weighted else []:
        options["weights"] = torch.rand(80, generator=make)
    with makebelieve.Gpu():
        ours, theirs = on_both(600, batches)
        for hessian in (ours, theirs):
            hessian.factor(1.0)
        W = torch.randn(5, 600, generator=make)
        torch.testing.assert_close(theirs.H.cpu(), ours.H, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(theirs.optimum(W.to("cuda:0")).cpu(), ours.optimum(W), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_moves_of_bfloat16_inputs_are_added_up_to_the_rounding_of_each_batch(fast, monkeypatch):
    monkeypatch.setattr(sparsegpt, "multiplies_bfloat16", lambda: fast)
    make = torch.Generator().manual_seed(0)
    batches = [[torch.randn(2, 40, width, generator=make).bfloat16() for width in (24, 24, 5)] for _ in range(3)]
    hessian = InputHessian(24, 6, "cpu")
    for X, shift, gain in batches:
        hessian.add_batch(X, shift=shift, gain=gain)
    for place, found in ((1, hessian._shift), (2, hessian._gain)):
        products = [batch[place].double().flatten(0, 1).t() @ batch[0].double().flatten(0, 1) for batch in batches]
        allowed = 2.0 ** -8 * sum(product.abs() for product in products) if fast else 0
        assert found.dtype == torch.float32
        assert ((found.double() - sum(products)).abs() <= allowed + 1e-4).all()


def test_a_gpu_adds_16_bit_products_without_a_copy():
    X = random(64, 300).bfloat16()
    with makebelieve.Gpu() as gpu:
        hessian, X = InputHessian(300, 1, "cuda:0"), X.to("cuda:0")
        hessian.add_batch(X, shift=X, gain=X)
        used = gpu.used
        gpu.peak = used
        hessian.add_batch(X, shift=X, gain=X)
        assert gpu.used == gpu.peak == used


def test_where_pytorch_adds_no_16_bit_products_to_float32_they_are_added_afterwards(monkeypatch):
    addmm = torch.addmm

    def refusing(*matrices, out_dtype=None, **options):
        if out_dtype is None:  # as on a CPU without AVX-512
            return addmm(*matrices, **options)
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    X = random(64, 30).bfloat16()
    matmul.accumulates.cache_clear()
    monkeypatch.setattr(torch, "addmm", refusing)
    with makebelieve.Gpu():
        assert not matmul.accumulates(torch.bfloat16, torch.device("cuda", 0))
        ours, theirs = on_both(30, [(X, {}), (X, {})])
        torch.testing.assert_close(theirs.H.cpu(), ours.H)
    matmul.accumulates.cache_clear()


def test_nothing_is_allocated_before_the_first_batch():
    """Hessians of a layer's inputs follow each other, and only one is on the GPU at a time."""
    with makebelieve.Gpu() as gpu:
        hessian = InputHessian(300, 1, "cuda:0")
        assert not gpu.used
        assert not hessian.H.any() and gpu.used >= 4 * 300 * 300


@pytest.mark.parametrize("act_order", [False, True])
def test_a_gpu_damps_and_prunes_as_a_cpu_does(act_order, monkeypatch):
    monkeypatch.setattr(linalg, "STRIP", 16)
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


def test_a_hessian_that_is_not_finite_is_refused_on_a_gpu():
    X = correlated_inputs(30, 4)
    X[3, 2] = float("nan")
    with makebelieve.Gpu():
        hessian = on_both(4, [(X.float(), {})])[1]
        with pytest.raises(torch.linalg.LinAlgError, match="NaN or inf"):
            hessian.factor(PERCDAMP)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pruning_one_input_takes_one_hessian_and_the_copies_of_the_walk(dtype, monkeypatch):
    monkeypatch.setattr(linalg, "STRIP", 32)
    monkeypatch.setattr("sparsegpt.WIDE", 32)  # else, of so few columns, not small
    columns, rows = 512, 64
    X, W = random(300, columns).to(dtype), random(rows, columns).to(dtype)
    with makebelieve.Gpu() as gpu:
        hessian, weight = InputHessian(columns, 1, "cuda:0"), W.to("cuda:0")
        hessian.add_batch(X.to("cuda:0"))
        gpu.peak = gpu.used
        hessian.factor(PERCDAMP)
        assert gpu.peak <= weight.nbytes + 4 * columns**2 * 1.2
        prune_one(hessian, weight, 0.5, blocksize=32)
        assert gpu.peak <= weight.nbytes + 4 * columns**2 * 1.2 + 4 * rows * columns * 4


# relative_error


def test_relative_error_is_the_error_of_the_outputs_whatever_the_scale_of_the_hessian():
    W, W_hat, X = random(5, 8), random(5, 8, seed=1), correlated_inputs(40, 8)
    for scale in (1.0, 2 / 7):
        assert relative_error(W, W_hat, scale * X.t() @ X) == pytest.approx(explicit_error(W, W_hat, X), rel=1e-10)
    assert relative_error(W, W, X.t() @ X) == 0
    assert relative_error(W, 0 * W, X.t() @ X) == pytest.approx(1)


def test_relative_error_is_0_where_the_output_vanishes():
    W, X = random(5, 8), correlated_inputs(40, 8, dead=range(4))
    W[:, 4:] = 0
    assert relative_error(W, 2 * W, X.t() @ X) == 0
    assert relative_error(W, 2 * W, torch.zeros(8, 8, dtype=torch.float64)) == 0
    assert relative_error(0 * W, W, torch.eye(8, dtype=torch.float64)) == 0


def test_relative_error_is_never_negative():
    H = torch.diag(torch.tensor([1.0, -1e-9]))  # as rounding may leave it
    assert relative_error(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), H) == 0


# the InputHessian


def calibrated(X, nsequences):
    """Return an InputHessian that has seen X (sequences, T, in)."""
    hessian = InputHessian(X.shape[-1], nsequences, "cpu")
    hessian.add_batch(X)
    return hessian


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


def test_factor_reports_the_damping_and_keeps_the_hessian_undamped():
    hessian = calibrated(torch.tensor([[[1.0, 2.0, 4.0, 1.0]]]), 2)
    before = hessian.H.clone()
    assert hessian.factor(0.0) == 1e-4
    assert hessian.factor(0.05) == 0.05
    torch.testing.assert_close(hessian.R, factor(before, 0.05)[0], rtol=0, atol=0)
    assert torch.equal(hessian.H, before)


@pytest.mark.parametrize("make", [
    pytest.param(lambda: random(12, 16), id="row-major"),
    pytest.param(lambda: random(16, 12).t(), id="column-major"),
    pytest.param(lambda: random(1, 16), id="one row")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [(0.5, 0, 0), (0.0, 2, 4)])
def test_prune_works_in_place_and_returns_the_true_error(make, dtype, target):
    X = correlated_inputs(64, 16).float().view(4, 16, 16)
    hessian = calibrated(X, 4)
    hessian.factor(PERCDAMP)
    weight = make().to(dtype)
    before, place = weight.clone(), weight.data_ptr()
    error, _ = prune_one(hessian, weight, *target, blocksize=8)
    assert weight.dtype == dtype and weight.data_ptr() == place
    assert (weight == 0).sum() == weight.numel() / 2
    true_error = explicit_error(before, weight, X.view(-1, 16))
    assert 0.001 < true_error < 1
    assert error == pytest.approx(true_error, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity, prunen, prunem, blocksize", [(0.6, 0, 0, 8), (0.0, 2, 4, 8), (0.0, 1, 8, 4)])
def test_prune_rounds_what_prune_matrix_returns_to_the_dtype_of_the_weight(dtype, sparsity, prunen, prunem, blocksize):
    hessian = calibrated(correlated_inputs(64, 16, dead=[2, 9]).float().view(4, 16, 16), 4)
    hessian.factor(PERCDAMP)
    first, second = random(8, 16).to(dtype), random(4, 16, seed=1).to(dtype)
    expected = [prune_matrix(weight.float(), hessian.R, hessian.H.diagonal(), sparsity, prunen, prunem,
                             blocksize=blocksize)[0]
                for weight in (first, second)]
    for weight, pruned in zip((first, second), expected, strict=True):  # one factor serves several matrices
        prune_one(hessian, weight, sparsity, prunen, prunem, blocksize=blocksize)
        assert torch.equal(weight, pruned.to(dtype))
        assert (weight[pruned == 0] == 0).all()


@pytest.mark.parametrize("target", [(0.5, 0, 0), (0.0, 2, 4)])
def test_prune_ranks_by_the_saliency_it_is_given(target):
    hessian = calibrated(correlated_inputs(64, 16).float().view(4, 16, 16), 4)
    hessian.factor(PERCDAMP)
    by_obs, by_isc = (random(8, 16).float() for _ in range(2))
    expected = prune_matrix(by_isc, hessian.R, hessian.H.diagonal(), *target, blocksize=8, saliency=isc_saliency)[0]
    prune_one(hessian, by_obs, *target, blocksize=8)
    prune_one(hessian, by_isc, *target, blocksize=8, saliency=isc_saliency)
    assert torch.equal(by_isc, expected)
    assert not torch.equal(by_isc == 0, by_obs == 0)


def test_the_weights_of_a_linear_module_are_pruned_in_place():
    X = correlated_inputs(64, 16).float()
    module = torch.nn.Linear(16, 8, bias=False)
    hessian = calibrated(X[None], 1)
    hessian.factor(PERCDAMP)
    with torch.no_grad():
        before = module(X)
        error, _ = prune_one(hessian, module.weight, 0.5)
        after = module(X)
    assert (module.weight == 0).sum() == 64
    assert error == pytest.approx(((before - after) ** 2).sum().item() / (before ** 2).sum().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [(0.5, 0, 0), (0.7, 0, 0), (0.0, 2, 4), (0.0, 4, 8)])
def test_the_error_is_well_below_that_of_magnitude_pruning(dtype, target):
    X = correlated_inputs(256, 32).float()
    hessian = calibrated(X[None], 1)
    hessian.factor(PERCDAMP)
    weight = random(24, 32).to(dtype)
    by_magnitude = explicit_error(weight, magnitude_prune(weight, *target), X)
    assert prune_one(hessian, weight, *target, blocksize=8)[0] < 0.75 * by_magnitude


def test_inputs_that_are_always_zero_are_pruned_without_error():
    hessian = calibrated(torch.zeros(2, 3, 8), 2)
    assert hessian.factor(0.0) == 0.0
    weight = random(4, 8).float()
    before = weight.clone()
    assert prune_one(hessian, weight, 0.0, 2, 4) == (0, None)
    assert zeros_per_group(weight, 4) == [2] * 8
    assert torch.equal(weight[weight != 0], before[weight != 0])
