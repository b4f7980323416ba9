"""A solver that the caller brings: any function of a problem, its answer checked."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import with_ridge

from composer_gradmatch import gram_omp
from composer_gradmatch.matching import SOLVERS, check_solver, normalize_weights
from composer_gradmatch.matching.nonnegative import solve_nonnegative
from composer_gradmatch.matching.omp import solve_fastest
from composer_gradmatch.matching.scikit_learn import solve_sklearn
from composer_gradmatch.matching.swap import solve_swap
from composer_gradmatch.matching.weighted_picks import match_mean_gradient

SIX = np.random.default_rng(0).standard_normal((6, 9))


def problem(gradients):
    gram = gradients @ gradients.T
    return gram, gram.mean(1)


def error(gradients, picks, weights):
    return np.sum((gradients[picks].T @ weights - gradients.mean(0)) ** 2)


def exhaustive(problem):
    """The best k samples of all, in inner products alone."""
    best = (-np.inf, (), np.empty(0))
    gram = problem.gram + problem.ridge * np.eye(len(problem.target))
    for picks in combinations(range(len(problem.target)), problem.k):
        right = problem.target[list(picks)]
        weights = np.linalg.solve(gram[np.ix_(picks, picks)], right)
        best = max(best, (weights @ right, picks, weights), key=lambda found: found[0])
    return list(best[1]), best[2]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(1, 3), st.sampled_from([0.0, 0.1]))
def test_an_exhaustive_solver_finds_the_least_error_of_all_subsets(seed, m, k, ridge):
    gradients = np.random.default_rng(seed).standard_normal((m, 9))
    gram, target = problem(gradients)
    k = min(k, m)
    indices, weights = gram_omp(gram, target, k, solver=exhaustive, ridge=ridge)
    extended = with_ridge(gradients, ridge * gram.trace() / m)
    mean = np.append(gradients.mean(0), np.zeros(m))
    errors = {
        picks: np.linalg.lstsq(extended[list(picks)].T, mean, rcond=None)[1][0] for picks in combinations(range(m), k)
    }
    assert np.sum((extended[indices].T @ weights - mean) ** 2) == pytest.approx(min(errors.values()), rel=1e-6)


def test_it_is_never_worse_than_greedy():
    for seed in range(20):
        gradients = np.random.default_rng(seed).standard_normal((10, 8))
        exact, greedy = (gram_omp(*problem(gradients), 4, solver=solver) for solver in (exhaustive, "omp"))
        assert error(gradients, *exact) <= error(gradients, *greedy) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("omp", solve_fastest),
        ("nonnegative", solve_nonnegative),
        ("swap", solve_swap),
        ("sklearn", solve_sklearn),
    ],
)
def test_a_named_solver_given_as_a_function_is_the_same_bit_for_bit(name, function):
    assert name in SOLVERS
    gram, target = problem(np.random.default_rng(1).standard_normal((30, 40)))
    options = {"ridge": 0.1, "tolerance": 0.01}
    by_name = gram_omp(gram, target, 12, solver=name, **options)
    given_ = gram_omp(gram, target, 12, solver=function, **options)
    assert all(np.array_equal(one, other) for one, other in zip(by_name, given_, strict=True))


def test_it_is_told_k_and_when_to_stop():
    gram, target = problem(SIX)
    seen = []

    def solver(problem):
        seen.append(problem)
        return [], []

    indices, weights = gram_omp(gram, target, 3, solver=solver, ridge=0.5, tolerance=0.25)
    assert indices.shape == weights.shape == (0,)
    assert indices.dtype == np.int64
    (problem_,) = seen
    assert problem_.k == 3
    assert problem_.ridge == pytest.approx(0.5 * gram.trace() / 6)
    assert problem_.enough == pytest.approx(0.75 * np.sum(SIX.mean(0) ** 2))
    np.testing.assert_array_equal(problem_.gram, gram)
    np.testing.assert_array_equal(problem_.target, target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_whatever_holds_its_numbers_the_answer_is_of_the_kind_of_the_gram_matrix(dtype, kind):
    gram, target = (torch.from_numpy(each).to(dtype) for each in problem(SIX))
    indices, weights = gram_omp(gram, target, 3, solver=lambda _: (kind([4, 1]), kind([0.5, 2.0])))
    assert indices.tolist() == [4, 1]
    assert indices.dtype == torch.int64
    assert weights.tolist() == [0.5, 2.0]
    assert weights.dtype == dtype


def test_a_match_takes_it():
    gram = torch.from_numpy(problem(SIX)[0])
    match = match_mean_gradient(gram, 3, solver=lambda _: ([5, 0, 2], [3.0, -1.0, 1.0]))
    assert match is not None
    assert match.indices.tolist() == [5, 2]
    torch.testing.assert_close(match.weights, normalize_weights(torch.tensor([3.0, 1.0]).double()))
    assert match_mean_gradient(gram, 3, solver=lambda _: ([5], [-1.0])) is None


def test_it_cannot_change_the_callers_numbers():
    gram, target = problem(SIX)
    before = gram.copy()

    def careless(problem):
        problem.gram[0] = 0.0
        return [0], [1.0]

    with pytest.raises(ValueError, match="read-only"):
        gram_omp(gram, target, 3, solver=careless)
    np.testing.assert_array_equal(gram, before)
    assert gram.flags.writeable


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (None, TypeError, "The solver answered must return a pair of picks and weights; got NoneType"),
        (np.ones((2, 2)), TypeError, "pair of picks and weights; got ndarray"),
        (([0], [1.0], 0.0), TypeError, "pair of picks and weights; got tuple"),
        (
            ([0, 1, 2, 3], [1.0] * 4),
            ValueError,
            r"at most k=3 picks and a weight for each; got shapes \(4,\) and \(4,\)",
        ),
        (([0, 1], [1.0]), ValueError, r"a weight for each; got shapes \(2,\) and \(1,\)"),
        (([[0, 1]], [[1.0, 1.0]]), ValueError, "a weight for each; got shapes"),
        (([0, 6], [1.0, 1.0]), ValueError, r"integers in \[0, 6\)"),
        (([-1], [1.0]), ValueError, r"integers in \[0, 6\)"),
        (([0.0, 1.0], [1.0, 1.0]), ValueError, r"integers in \[0, 6\).*float64"),
        (([True, False], [1.0, 1.0]), ValueError, r"integers in \[0, 6\).*bool"),
        (([2, 0, 2], [1.0, 1.0, 1.0]), ValueError, r"no sample twice; got \[2 0 2\]"),
        (([0], [float("nan")]), ValueError, "finite, real weights"),
        (([0], [float("inf")]), ValueError, "finite, real weights"),
        (([0], [1j]), ValueError, "finite, real weights"),
        (([0], ["1"]), ValueError, "finite, real weights"),
    ],
)
def test_an_answer_that_is_none_is_refused(answer, error, message):
    def answered(problem):
        return answer

    with pytest.raises(error, match=message):
        gram_omp(*problem(SIX), 3, solver=answered)


@pytest.mark.parametrize("solver", ["lasso", None, 3, ["omp"]])
def test_what_is_no_solver_is_refused(solver):
    with pytest.raises(ValueError, match="solver must be a function of a Problem, or one of omp"):
        check_solver(solver, 0.0, 0.0)


def test_a_function_is_a_solver():
    check_solver(exhaustive, 0.0, 0.0)
    with pytest.raises(ValueError, match="ridge must be a number >= 0"):
        check_solver(exhaustive, -1.0, 0.0)
