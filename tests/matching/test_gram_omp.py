from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import brute_force_omp
from sklearn.linear_model import orthogonal_mp_gram

from composer_gradmatch import gram_omp, normalize_weights
from composer_gradmatch.matching import effective_sample_size, matching_residual


def problem(gradients):
    gram = gradients @ gradients.T
    return gram, gram.mean(axis=1)


def random_gradients(m, d, seed=0):
    return np.random.default_rng(seed).standard_normal((m, d))


def squared_error(gradients, indices, weights):
    return np.sum((gradients[indices].T @ weights - gradients.mean(0)) ** 2)


@st.composite
def gradient_sets(draw):
    """Rank-deficient, duplicated, zero and single-direction rows at scales from 1e-12 to 1e12."""
    m, d = draw(st.integers(1, 10)), draw(st.integers(1, 8))
    small = st.integers(-3, 3).map(float)
    wide = st.floats(-1, 1, width=32).map(lambda x: round(x, 3))
    rows = draw(arrays(np.float64, (m, d), elements=draw(st.sampled_from([small, wide]))))
    for i in draw(st.lists(st.integers(0, m - 1), max_size=4)):
        rows[i] = rows[draw(st.integers(0, m - 1))] * draw(st.sampled_from([0.0, 1.0, 2.0, -1.0]))
    return rows * 10.0 ** draw(st.integers(-12, 12))


@settings(max_examples=400, deadline=None)
@given(gradient_sets(), st.data())
def test_every_step_is_the_greedy_one_and_weights_are_least_squares(gradients, data):
    """Holds for ties too, where the picks themselves are not determined."""
    gram, target = problem(gradients)
    k = data.draw(st.integers(1, len(gradients)))
    indices, weights = gram_omp(gram, target, k)
    assert len(set(indices.tolist())) == len(indices) <= k

    norms = np.linalg.norm(gradients, axis=1)
    mean = gradients.mean(0)
    units = norms * np.linalg.norm(mean)
    for step in range(len(indices) + 1):
        picked = indices[:step]
        gamma = np.linalg.lstsq(gradients[picked].T, mean, rcond=1e-12)[0] if step else np.empty(0)
        alpha = gradients @ (mean - gradients[picked].T @ gamma)
        others = np.setdiff1d(np.arange(len(gradients)), picked)
        best = alpha[others].max(initial=-np.inf)
        slack = 1e-6 * units.max() + 1e-14 * norms.max() ** 2
        if step < len(indices):
            assert alpha[indices[step]] > 0
            assert alpha[indices[step]] >= best - slack
        elif step < k:
            assert best <= slack, "stopped although there was something to gain"
    np.testing.assert_allclose(
        gradients[indices].T @ weights, gradients[indices].T @ gamma, atol=1e-6 * max(np.linalg.norm(mean), 1e-300)
    )


@settings(max_examples=200, deadline=None)
@given(gradient_sets(), st.data())
def test_picks_and_weights_equal_brute_force_where_no_tie_decides(gradients, data):
    gram, target = problem(gradients)
    k = data.draw(st.integers(1, len(gradients)))
    expected, expected_weights, margins = brute_force_omp(gradients, gradients.mean(0), k)
    assume(all(margin > 1e-6 for margin in margins))
    picked = gradients[expected]
    assume(len(expected) == 0 or np.linalg.cond(picked / np.linalg.norm(picked, axis=1, keepdims=True)) < 1e4)
    indices, weights = gram_omp(gram, target, k)
    assert indices.tolist() == expected.tolist()
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("m", "d", "k"), [(1, 3, 1), (8, 20, 8), (64, 30, 12), (128, 650, 64), (40, 5, 40)])
def test_equals_brute_force_on_random_problems(m, d, k):
    gradients = random_gradients(m, d, seed=m)
    gram, target = problem(gradients)
    expected, expected_weights, _ = brute_force_omp(gradients, gradients.mean(0), k)
    indices, weights = gram_omp(gram, target, k)
    assert indices.tolist() == expected.tolist()
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6, atol=1e-9)


def test_the_residual_never_increases_with_k():
    gradients = random_gradients(30, 40)
    gram, target = problem(gradients)
    errors = [squared_error(gradients, *gram_omp(gram, target, k)) for k in range(1, 31)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-20 < errors[0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 20))
def test_a_permuted_problem_gives_the_permuted_answer(seed, m):
    gradients = random_gradients(m, m + 3, seed)
    permutation = np.random.default_rng(seed + 1).permutation(m)
    indices, weights = gram_omp(*problem(gradients), max(1, m // 2))
    permuted_indices, permuted_weights = gram_omp(*problem(gradients[permutation]), max(1, m // 2))
    assert permutation[permuted_indices].tolist() == indices.tolist()
    np.testing.assert_allclose(permuted_weights, weights, rtol=1e-8)


@pytest.mark.parametrize("exponent", [-12, -3, 3, 12])
def test_scaling_changes_nothing(exponent):
    gram, target = problem(random_gradients(32, 20, seed=3))
    scale = 10.0**exponent
    for solver in ("omp", "sklearn"):
        indices, weights = gram_omp(gram, target, 10, solver=solver)
        scaled_indices, scaled_weights = gram_omp(gram * scale, target * scale, 10, solver=solver)
        assert scaled_indices.tolist() == indices.tolist()
        np.testing.assert_allclose(scaled_weights, weights, rtol=1e-9)


def test_of_two_identical_samples_one_is_picked_and_carries_both_weights():
    gradients = random_gradients(6, 10)
    gradients[4] = gradients[1]
    indices, weights = gram_omp(*problem(gradients), 6)
    assert sorted(indices.tolist()) == [0, 1, 2, 3, 5]
    expected = {i: 2 / 6 if i == 1 else 1 / 6 for i in indices.tolist()}
    np.testing.assert_allclose(weights, [expected[i] for i in indices.tolist()])


def test_picking_everything_gives_the_mean_itself():
    indices, weights = gram_omp(*problem(random_gradients(7, 30)), 7)
    assert sorted(indices.tolist()) == list(range(7))
    np.testing.assert_allclose(weights, 1 / 7)


def test_a_mean_that_cancels_but_for_rounding_is_nothing_to_match():
    gradients = np.array([[-0.01], [-0.02], [0.03]])
    gram, target = problem(gradients)
    assert target.any()
    assert len(gram_omp(gram, target, 2)[0]) == 0


def test_stops_when_nothing_is_left_to_gain():
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    indices, weights = gram_omp(*problem(opposite), 3)
    assert indices.tolist() == [2]
    np.testing.assert_allclose(weights, 1 / 3)


@pytest.mark.parametrize("solver", ["omp", "sklearn"])
def test_all_zero_gradients_give_no_pick(solver):
    indices, weights = gram_omp(np.zeros((4, 4)), np.zeros(4), 2, solver=solver)
    assert indices.shape == weights.shape == (0,)
    assert indices.dtype == np.int64


@pytest.mark.parametrize(("m", "d", "k"), [(128, 650, 12), (128, 650, 64), (50, 20, 10), (5, 3, 1)])
def test_the_sklearn_rule_equals_scikit_learn(m, d, k):
    gram, target = problem(random_gradients(m, d, seed=k))
    indices, weights = gram_omp(gram, target, k, solver="sklearn")
    expected = orthogonal_mp_gram(gram, target, n_nonzero_coefs=k)
    dense = np.zeros(m)
    dense[indices] = weights
    np.testing.assert_allclose(dense, expected, rtol=1e-9, atol=1e-12)
    # In the order picked: the first picks are those of a smaller problem.
    for fewer in range(1, min(k, 4)):
        assert gram_omp(gram, target, fewer, solver="sklearn")[0].tolist() == indices[:fewer].tolist()


def test_the_sklearn_rule_wastes_a_pick_on_a_sample_that_points_away_and_the_signed_rule_does_not():
    gradients = np.array([[1.0, 0.1, 0.0], [1.0, -0.2, 0.0], [1.0, 0.0, 0.3], [-2.0, 0.0, 0.0]])
    gram, target = problem(gradients)
    indices, weights = gram_omp(gram, target, 2, solver="sklearn")
    assert indices[0] == 3
    assert weights[0] < 0
    indices, weights = gram_omp(gram, target, 2)
    assert 3 not in indices
    assert (weights > 0).all()


def test_torch_in_torch_out_and_inputs_are_not_changed():
    gram, target = problem(random_gradients(10, 6))
    gram.flags.writeable = target.flags.writeable = False
    indices, weights = gram_omp(gram, target, 4)
    tensors = torch.tensor(gram, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)
    copies = [t.clone() for t in tensors]
    torch_indices, torch_weights = gram_omp(*tensors, 4)
    assert torch_indices.dtype == torch.int64
    assert torch_weights.dtype == torch.float32
    assert torch_indices.tolist() == indices.tolist()
    np.testing.assert_allclose(torch_weights.numpy(), weights, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize(
    ("gram", "target", "k", "error", "message"),
    [
        (np.eye(3)[:2], np.ones(3), 1, ValueError, "square"),
        (np.eye(3), np.ones(2), 1, ValueError, r"shape \(3,\)"),
        (np.eye(3), np.ones(3), 0, ValueError, "between 1 and the number of samples, 3; got 0"),
        (np.eye(3), np.ones(3), 4, ValueError, "between 1 and the number of samples, 3; got 4"),
        (np.eye(3), np.ones(3), 1.5, TypeError, "integer"),
        (np.eye(3), np.array([1, np.nan, 1]), 1, ValueError, "finite"),
        (np.full((3, 3), np.inf), np.ones(3), 1, ValueError, "finite"),
        (np.eye(3), torch.ones(3), 1, TypeError, "both"),
        ([[1.0]], [1.0], 1, TypeError, "numpy"),
    ],
)
def test_bad_input_is_refused(gram, target, k, error, message):
    with pytest.raises(error, match=message):
        gram_omp(gram, target, k)


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(ValueError, match="omp, nonnegative, swap, sklearn; got 'lasso'"):
        gram_omp(np.eye(2), np.ones(2), 1, solver="lasso")  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float64, st.integers(1, 20), elements=st.floats(-1, 1).map(lambda x: round(x, 3))), st.integers(-12, 12)
)
def test_normalized_weights_are_clipped_and_sum_to_their_number(weights, exponent):
    weights = weights * 10.0**exponent
    if weights.max() <= 0:
        with pytest.raises(ValueError, match="positive"):
            normalize_weights(weights)
        return
    normalized = normalize_weights(weights)
    assert (normalized[weights <= 0] == 0).all()
    assert normalized.sum() == pytest.approx(len(weights))
    positive = weights > 1e-6 * weights.max()
    ratios = normalized[positive] / weights[positive]
    np.testing.assert_allclose(ratios, ratios[0])
    np.testing.assert_allclose(normalize_weights(torch.from_numpy(weights)).numpy(), normalized)


def test_matching_residual_is_the_relative_squared_error_of_the_mean():
    gradients = random_gradients(20, 8)
    gram, target = problem(gradients)
    indices, weights = np.array([3, 1, 7]), np.array([1.5, 1.0, 0.5])
    expected = np.sum((gradients[indices].T @ weights / 3 - gradients.mean(0)) ** 2) / np.sum(gradients.mean(0) ** 2)
    residual = matching_residual(*map(torch.from_numpy, (gram, target, indices, weights)))
    assert residual.item() == pytest.approx(expected)


def test_where_few_samples_carry_the_gradient_the_normalised_step_is_longer_than_the_mean():
    """Algorithm 1's normalisation: 4 of 40 samples carry everything, so their mean is ten times the batch's."""
    gradients = np.zeros((40, 6))
    gradients[:4] = random_gradients(4, 6)
    gram, target = problem(gradients)
    indices, weights = gram_omp(gram, target, 12)
    assert sorted(indices.tolist()) == [0, 1, 2, 3]
    np.testing.assert_allclose(weights, 1 / 40)
    residual = matching_residual(*map(torch.from_numpy, (gram, target, indices, normalize_weights(weights))))
    assert residual.item() == pytest.approx(9**2)


def test_effective_sample_size_is_between_one_and_the_number_of_picks():
    assert effective_sample_size(torch.ones(7)) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([7.0, 0.0])) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([3.0, 1.0])) == pytest.approx(1.6)
