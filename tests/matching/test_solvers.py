"""Each solver against an independent reference on explicit gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import brute_force_nonnegative_omp, brute_force_omp, squared_error, with_ridge
from scipy.optimize import nnls
from sklearn.linear_model import orthogonal_mp_gram

from composer_gradmatch import gram_omp, last_layer_gram
from composer_gradmatch.matching import SOLVERS
from composer_gradmatch.matching.compiled import solve_compiled
from composer_gradmatch.matching.problem import Problem
from composer_gradmatch.matching.pursuit import solve_omp


def gradients_of(m, d, seed):
    """Gradients with a common direction, as those of a minibatch, so that weights tend to be positive but not all."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, d)) + 0.5 * rng.standard_normal(d)


def problem(gradients):
    gram = gradients @ gradients.T
    return gram, gram.mean(axis=1)


sizes = st.tuples(st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 40), st.integers(1, 24))


@settings(max_examples=200, deadline=None)
@given(sizes, st.sampled_from([0.0, 0.1, 3.0]), st.sampled_from([np.inf, 0.5]))
def test_the_compiled_solver_makes_the_plain_ones_picks(size, ridge, share):
    seed, m, d, k = size
    gram, target = problem(gradients_of(m, d, seed))
    given_ = Problem(gram, target, min(k, m), ridge * gram.trace() / m, share * target.mean())
    (picks, weights), (compiled_picks, compiled_weights) = solve_omp(given_), solve_compiled(given_)
    # Beyond the rank of the problem rounding decides whether there is another pick.
    common = min(len(picks), len(compiled_picks), d if ridge == 0 else m)
    assert compiled_picks[:common].tolist() == picks[:common].tolist()
    if len(picks) == len(compiled_picks) <= common:
        np.testing.assert_allclose(compiled_weights, weights, rtol=1e-6, atol=1e-9 * np.abs(weights).max(initial=0))


@pytest.mark.parametrize(("m", "k"), [(128, 64), (300, 150), (513, 100)])
def test_the_compiled_solver_equals_the_plain_one_where_it_works_in_blocks(m, k):
    gram, target = problem(gradients_of(m, 2 * m, seed=m))
    plain, compiled = solve_omp(Problem(gram, target, k)), solve_compiled(Problem(gram, target, k))
    assert compiled[0].tolist() == plain[0].tolist()
    np.testing.assert_allclose(compiled[1], plain[1], rtol=1e-8)


def test_of_equal_samples_both_take_the_one_that_comes_first():
    gradients = np.repeat(gradients_of(4, 12, seed=1), 3, axis=0)
    for solve in (solve_omp, solve_compiled):
        assert (solve(Problem(*problem(gradients), 3))[0] % 3 == 0).all()


@pytest.mark.parametrize(
    "change",
    [np.asfortranarray, lambda gram: np.repeat(gram, 2, axis=1)[:, ::2], lambda gram: gram.astype(np.float32)],
    ids=["fortran order", "strided", "float32"],
)
def test_any_layout_gives_the_same_picks(change):
    gram, target = problem(gradients_of(40, 60, seed=2))
    gram = gram.astype(np.float32).astype(np.float64)
    expected, weights = gram_omp(gram, target, 12)
    picks, changed_weights = gram_omp(change(gram), target, 12)
    assert picks.tolist() == expected.tolist()
    np.testing.assert_allclose(changed_weights, weights, rtol=1e-5)


def test_half_precision_and_integer_gram_matrices_are_taken():
    gram = torch.tensor([[4, 1], [1, 2]])
    expected = gram_omp(gram.double(), gram.double().mean(1), 1)
    for dtype in (torch.int64, torch.bfloat16, torch.float16):
        picks, weights = gram_omp(gram.to(dtype), gram.double().mean(1), 1)
        assert picks.tolist() == expected[0].tolist()
        torch.testing.assert_close(weights.double(), expected[1], rtol=1e-2, atol=0)


def test_without_numba_the_plain_solver_works():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from composer_gradmatch import gram_omp\n"
        "print(gram_omp(np.diag([1.0, 4.0, 9.0]), np.array([1.0, 2.0, 3.0]), 2)[0].tolist())\n"
        "assert 'composer_gradmatch.matching.compiled' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[2, 1]"


@settings(max_examples=200, deadline=None)
@given(sizes, st.sampled_from([0.0, 0.05]))
def test_nonnegative_weights_are_the_non_negative_least_squares_of_their_picks(size, ridge):
    seed, m, d, k = size
    gradients = gradients_of(m, d, seed)
    gram, target = problem(gradients)
    extended = with_ridge(gradients, ridge * gram.trace() / m)
    mean = np.append(gradients.mean(0), np.zeros(m))
    indices, weights = gram_omp(gram, target, min(k, m), solver="nonnegative", ridge=ridge)
    assert len(set(indices.tolist())) == len(indices) <= min(k, m)
    assert (weights > 0).all()
    expected, _ = nnls(extended[indices].T, mean)
    np.testing.assert_allclose(
        extended[indices].T @ weights, extended[indices].T @ expected, atol=1e-7 * np.linalg.norm(mean)
    )


def test_nonnegative_omp_equals_brute_force_with_scipy():
    negative = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        gradients, matched = rng.standard_normal((20, 12)), rng.standard_normal(12)
        gram, target = gradients @ gradients.T, gradients @ matched
        expected, expected_weights = brute_force_nonnegative_omp(gradients, matched, 8)
        indices, weights = gram_omp(gram, target, 8, solver="nonnegative")
        assert sorted(indices.tolist()) == sorted(expected.tolist())
        np.testing.assert_allclose(weights[indices.argsort()], expected_weights[expected.argsort()], rtol=1e-6)
        negative += (gram_omp(gram, target, 8)[1] < 0).any()
    assert negative > 10, "OMP has negative weights in some of these problems, or nothing is tested"


@pytest.mark.parametrize("seed", [999, 1669, 1976, 2886, 2970])
def test_a_sample_that_is_dropped_in_a_step_can_come_back_in_it(seed):
    """One in some hundred problems: found by watching the solver, decided by SciPy."""
    rng = np.random.default_rng(seed)
    gradients, matched = rng.standard_normal((40, 12)), rng.standard_normal(12)
    expected, expected_weights = brute_force_nonnegative_omp(gradients, matched, 12)
    indices, weights = gram_omp(gradients @ gradients.T, gradients @ matched, 12, solver="nonnegative")
    assert sorted(indices.tolist()) == sorted(expected.tolist())
    np.testing.assert_allclose(weights[indices.argsort()], expected_weights[expected.argsort()], rtol=1e-5)


def test_where_no_weight_would_be_negative_nonnegative_omp_is_omp():
    gram, target = problem(gradients_of(64, 200, seed=3))
    plain, nonnegative = gram_omp(gram, target, 10), gram_omp(gram, target, 10, solver="nonnegative")
    assert (plain[1] > 0).all()
    assert nonnegative[0].tolist() == plain[0].tolist()
    np.testing.assert_allclose(nonnegative[1], plain[1], rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 30), st.integers(1, 6))
def test_after_swaps_no_exchange_is_left_that_lowers_the_error(seed, m, d, k):
    gradients = gradients_of(m, d, seed)
    gram, target = problem(gradients)
    mean = gradients.mean(0)
    k = min(k, m, d)
    indices, weights = gram_omp(gram, target, k, solver="swap")
    error = np.sum((gradients[indices].T @ weights - mean) ** 2)
    greedy, _ = gram_omp(gram, target, k)
    assert error <= squared_error(gradients, mean, greedy) * (1 + 1e-9) + 1e-12 * mean @ mean
    assert error == pytest.approx(squared_error(gradients, mean, indices), abs=1e-9 * mean @ mean)
    for position in range(len(indices)):
        others = np.delete(indices, position)
        for entering in set(range(m)) - set(indices.tolist()):
            exchanged = [*others, entering]
            if np.linalg.lstsq(gradients[exchanged].T, mean, rcond=None)[0][-1] > 0:
                assert squared_error(gradients, mean, exchanged) >= error - 1e-8 * mean @ mean


def test_swaps_do_lower_the_error():
    lower = 0
    for seed in range(20):
        gradients = gradients_of(30, 60, seed)
        errors = [
            squared_error(gradients, gradients.mean(0), gram_omp(*problem(gradients), 8, solver=solver)[0])
            for solver in ("omp", "swap")
        ]
        lower += errors[1] < errors[0] * 0.999
    assert lower > 10


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_a_ridge_is_a_coordinate_of_its_own_for_each_sample(ridge):
    gradients = gradients_of(30, 20, seed=5)
    gram, target = problem(gradients)
    extended = with_ridge(gradients, ridge * gram.trace() / 30)
    mean = np.append(gradients.mean(0), np.zeros(30))
    expected, expected_weights, _ = brute_force_omp(extended, mean, 12)
    for given_ in (gram, torch.from_numpy(gram)):
        indices, weights = gram_omp(given_, _like(target, given_), 12, ridge=ridge)
        assert indices.tolist() == expected.tolist()
        np.testing.assert_allclose(np.asarray(weights), expected_weights, rtol=1e-8)
    _, sklearn_weights = gram_omp(gram, target, 12, solver="sklearn", ridge=ridge)
    reference = orthogonal_mp_gram(extended @ extended.T, target, n_nonzero_coefs=12)
    np.testing.assert_allclose(sorted(sklearn_weights), sorted(reference[reference != 0]), rtol=1e-8)


def _like(array, other):
    return torch.from_numpy(array) if isinstance(other, torch.Tensor) else array


def test_a_ridge_shares_the_weight_of_duplicates_and_makes_weights_more_even():
    gradients = gradients_of(10, 20, seed=6)
    gradients[7] = gradients[2]
    indices, weights = gram_omp(*problem(gradients), 10, ridge=0.1)
    of = dict(zip(indices.tolist(), weights.tolist(), strict=True))
    assert of[2] == pytest.approx(of[7])
    spread = [np.std(w := gram_omp(*problem(gradients), 5, ridge=r)[1]) / w.mean() for r in (0.0, 10.0)]
    assert spread[1] < spread[0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("ridge", [0.0, 0.02])
def test_a_tolerance_stops_at_the_first_step_that_meets_it(solver, ridge):
    gradients = gradients_of(40, 30, seed=7)
    gram, target = problem(gradients)
    extended = with_ridge(gradients, ridge * gram.trace() / 40)
    mean = np.append(gradients.mean(0), np.zeros(40))

    def error(indices, weights):
        return np.sum((extended[indices].T @ weights - mean) ** 2) / (mean @ mean)

    indices, weights = gram_omp(gram, target, 30, solver=solver, ridge=ridge, tolerance=0.2)
    assert error(indices, weights) <= 0.2
    assert 1 < len(indices) < 30
    if solver != "swap":  # which exchanges its picks after the last step
        fewer = gram_omp(gram, target, len(indices) - 1, solver=solver, ridge=ridge)
        assert error(*fewer) > 0.2


def test_the_tolerance_is_relative_to_the_vector_that_is_matched():
    gradients = gradients_of(20, 30, seed=8)
    other = gradients[:8].sum(0)
    gram, target = gradients @ gradients.T, gradients @ other
    indices, weights = gram_omp(gram, target, 20, tolerance=0.1, norm_squared=float(other @ other))
    assert np.sum((gradients[indices].T @ weights - other) ** 2) <= 0.1 * (other @ other)
    assert len(indices) < 20
    with pytest.raises(ValueError, match="norm_squared must be a number >= 0"):
        gram_omp(gram, target, 3, norm_squared=-1.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_a_mean_that_cancels_is_nothing_to_match(solver, tolerance):
    """As with features that are all alike and balanced labels: the target is rounding error, of either sign."""
    for m in range(4, 40, 4):
        labels = np.eye(4)[np.arange(m) % 4]
        gram = 50.1 * (0.25 - labels) @ (0.25 - labels).T
        picks, weights = gram_omp(gram, gram.mean(1), max(1, m // 3), solver=solver, tolerance=tolerance)
        assert len(picks) == len(weights) == 0 or np.abs(gram[picks].T @ weights).max() < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
def test_near_duplicates_kill_no_run_and_make_no_match_worse_than_greedy(solver):
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        twin = torch.randint(0, 30, (60,), generator=generator)
        h = torch.randn(30, 4, generator=generator)[twin] + 2e-5 * torch.randn(60, 4, generator=generator)
        labels = torch.randint(0, 3, (30,), generator=generator)[twin]
        p = (h @ torch.randn(4, 3, generator=generator)).softmax(1) - torch.nn.functional.one_hot(labels, 3)
        gram = last_layer_gram(h.double(), p.double())
        errors = []
        for name in ("omp", solver):
            picks, weights = gram_omp(gram, gram.mean(1), 30, solver=name)
            u = torch.zeros(60, dtype=torch.float64).index_put((picks,), weights) - 1 / 60
            errors.append((u @ gram @ u / gram.mean()).item())
        assert solver != "swap" or errors[1] <= errors[0] + 1e-9


def test_where_numbas_cache_is_broken_matching_goes_on_in_numpy(tmp_path):
    code = (
        "import sys, warnings, numpy as np\n"
        "from composer_gradmatch import gram_omp\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        print(gram_omp(np.diag([1.0, 4.0, 9.0]), np.array([1.0, 2.0, 3.0]), 2)[0].tolist())\n"
        "print([str(w.message)[:35] for w in caught if 'compiled' in str(w.message)])"
    )

    def run():
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        ).stdout.split("\n")

    assert run()[:3] == ["[2, 1]", "[2, 1]", "[]"]
    for index in tmp_path.rglob("*.nbi"):
        index.write_bytes(b"")
    assert run()[:3] == ["[2, 1]", "[2, 1]", "['Matching pursuit could not be compi']"]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("ridge", -0.1, "ridge must be a number >= 0"),
        ("ridge", float("nan"), "ridge must be a number >= 0"),
        ("ridge", "0.1", "ridge must be a number >= 0"),
        ("tolerance", 1.0, r"tolerance must be in \[0, 1\)"),
        ("tolerance", True, r"tolerance must be in \[0, 1\)"),
    ],
)
def test_numbers_out_of_range_are_refused(argument, value, message):
    with pytest.raises(ValueError, match=message):
        gram_omp(np.eye(2), np.ones(2), 1, **{argument: value})


@settings(max_examples=100, deadline=None)
@given(sizes, st.sampled_from(list(SOLVERS)), st.sampled_from([0.0, 0.1]), st.integers(-12, 12))
def test_every_solver_ends_with_distinct_picks_at_any_scale_and_rank(size, solver, ridge, exponent):
    seed, m, d, k = size
    gradients = np.random.default_rng(seed).integers(-2, 3, (m, d)) * 10.0**exponent
    indices, weights = gram_omp(*problem(gradients), min(k, m), solver=solver, ridge=ridge)
    assert len(set(indices.tolist())) == len(indices) == len(weights) <= min(k, m)
    assert np.isfinite(weights).all()
    assume(len(indices))
    extended = with_ridge(gradients, ridge * (gradients**2).sum() / m)
    mean = np.append(gradients.mean(0), np.zeros(m))
    assert np.sum((extended[indices].T @ weights - mean) ** 2) <= mean @ mean * (1 + 1e-9)
