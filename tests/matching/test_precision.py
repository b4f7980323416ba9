"""Gram matrices in float32, float16 and bfloat16: what their own rounding hides is not picked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import brute_force_omp

from composer_gradmatch import gram_omp, last_layer_gram
from composer_gradmatch.matching import SOLVERS
from composer_gradmatch.matching.compiled import solve_compiled
from composer_gradmatch.matching.gram_omp import _solve_on_device
from composer_gradmatch.matching.on_device import fixed_omp
from composer_gradmatch.matching.problem import DEPENDENT, EXACT, Precision, Problem
from composer_gradmatch.matching.pursuit import solve_omp

COARSE = [torch.float32, torch.float16, torch.bfloat16]
WAYS = [*SOLVERS, "numpy", "device"]  # Of which numpy has no bfloat16: its case is that of a tensor again.


def classifier(seed, m, d, c, *, duplicates=False, spread=0.0):
    """H and P of a classifier with a bias, float32, and the explicit gradients, float64."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.relu(torch.randn(m, d, generator=generator)) * torch.logspace(0, -spread, d)
    labels = torch.randint(c, (m,), generator=generator)
    p = torch.softmax(torch.randn(m, c, generator=generator), 1) - torch.nn.functional.one_hot(labels, c)
    if duplicates:
        of = torch.randint(max(1, m // 3), (m,), generator=generator)
        h, p = h[of], p[of]
    with_one = torch.cat([h, torch.ones(m, 1)], 1).double()
    return h, p, torch.einsum("mc,md->mcd", p.double(), with_one).flatten(1).numpy()


def solved(gram, target, k, way):
    """Picks and weights, float64, of a solver, of numpy arrays, or of the work on a device."""
    if way == "device":
        picks, weights = _solve_on_device(gram, target, k, 0.0)
    elif way == "numpy" and gram.dtype != torch.bfloat16:
        picks, weights = map(torch.from_numpy, gram_omp(gram.numpy(), target.numpy(), k))
    else:
        picks, weights = gram_omp(gram, target, k, solver="omp" if way == "numpy" else way)
    return picks.numpy(), weights.double().numpy()


def error(gradients, picks, weights):
    """Of the match, relative to that of no samples at all."""
    mean = gradients.mean(0)
    return np.sum((weights @ gradients[picks] - mean) ** 2) / np.sum(mean**2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "largest_error"), [(torch.float32, 1e-8), (torch.float16, 2e-3), (torch.bfloat16, 0.1)]
)
@pytest.mark.parametrize(("m", "d", "c"), [(64, 8, 2), (100, 4, 3)])
def test_there_are_no_more_picks_than_the_gradients_rank(dtype, largest_error, way, m, d, c):
    rank = (d + 1) * (c - 1)
    for seed in range(10):
        h, p, gradients = classifier(seed, m, d, c)
        gram = last_layer_gram(h.to(dtype), p.to(dtype))
        picks, weights = solved(gram, gram.mean(1), m // 2, way)
        assert len(picks) <= rank
        if dtype == torch.float32:
            assert len(picks) == rank
        assert error(gradients, picks, weights) <= largest_error
        assert np.abs(weights).max() < 0.5


problems = st.tuples(
    st.integers(0, 10**6),
    st.integers(2, 60),
    st.integers(1, 20),
    st.integers(2, 4),
    st.booleans(),
    st.sampled_from([0, 3]),
)


@settings(max_examples=150, deadline=None)
@given(problems, st.sampled_from(COARSE), st.sampled_from(["last_layer_gram", "rounded"]), st.data())
def test_no_match_is_worse_than_no_samples_and_no_swap_worse_than_omp(size, dtype, how, data):
    seed, m, d, c, duplicates, spread = size
    h, p, gradients = classifier(seed, m, d, c, duplicates=duplicates, spread=spread)
    if how == "rounded":
        gram = torch.from_numpy(gradients @ gradients.T)
        gram, target = gram.to(dtype), gram.mean(1).to(dtype)
    else:
        gram = last_layer_gram(h.to(dtype), p.to(dtype))
        target = gram.mean(1)
    k = data.draw(st.integers(1, m))
    errors = {}
    for way in WAYS:
        picks, weights = solved(gram, target, k, way)
        assert len(set(picks.tolist())) == len(picks) == len(weights) <= k
        errors[way] = error(gradients, picks, weights)
        # A mean gradient that is as small as the rounding is matched no better than it is known.
        assert errors[way] <= 1 + 4 * float(torch.finfo(dtype).eps)
    assert errors["swap"] <= errors["omp"] + 1e-3 * torch.finfo(dtype).eps


@settings(max_examples=100, deadline=None)
@given(problems, st.data())
def test_picks_and_weights_of_float32_are_float64s_where_no_tie_decides(size, data):
    seed, m, d, c, duplicates, _ = size
    _, _, gradients = classifier(seed, m, d, c, duplicates=duplicates)
    gram = torch.from_numpy(gradients @ gradients.T)
    k = data.draw(st.integers(1, m))
    expected, expected_weights, margins = brute_force_omp(gradients, gradients.mean(0), k)
    assume(all(margin > 1e-4 for margin in margins))
    assume(len(expected) and np.linalg.cond(gradients[expected]) < 100)
    for way in ("omp", "device", "numpy"):
        picks, weights = solved(gram.float(), gram.mean(1).float(), k, way)
        n = min(len(picks), len(expected))
        assert n >= len(expected) - 1
        assert picks[:n].tolist() == expected[:n].tolist()
        if len(picks) == len(expected):
            np.testing.assert_allclose(weights, expected_weights, rtol=1e-3, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(problems, st.sampled_from(COARSE), st.sampled_from(WAYS), st.integers(-3, 3))
def test_scaling_by_a_power_of_two_changes_nothing(size, dtype, way, exponent):
    seed, m, d, c, duplicates, _ = size
    h, p, _ = classifier(seed, m, d, c, duplicates=duplicates)
    gram = last_layer_gram(h.to(dtype), p.to(dtype))
    # Away from float16's subnormal numbers, which have other spacings.
    gram = torch.where(gram.abs() > 1e-2, gram, 0)
    target = torch.where(gram.mean(1).abs() > 1e-2, gram.mean(1), 0)
    picks, weights = solved(gram, target, max(1, m // 2), way)
    again, scaled = solved(gram * 2.0**exponent, target * 2.0**exponent, max(1, m // 2), way)
    # Of duplicates one may be picked for another: how sums are rounded depends on where numbers lie in memory.
    rows, same_rows = (torch.from_numpy(np.asarray(gram.float()))[each.tolist()] for each in (again, picks))
    torch.testing.assert_close(rows, same_rows, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(scaled, weights, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_numbers_next_to_zero_have_an_absolute_rounding(way):
    """Float16 has eleven bits down to 6e-5, and none at 6e-8."""
    for seed in range(10):
        _, _, gradients = classifier(seed, 40, 8, 2)
        gram = torch.from_numpy(gradients @ gradients.T) * 2e-6
        half, target = gram.to(torch.float16), gram.mean(1).to(torch.float16)
        picks, weights = solved(half, target, 20, way)
        assert len(picks) <= 9
        assert error(gradients, picks, weights) <= 1


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("way", WAYS)
def test_a_mean_that_cancels_is_nothing_to_match(dtype, way):
    """As with features that are all alike and balanced labels."""
    generator = torch.Generator().manual_seed(0)
    for m in range(4, 40, 4):
        p = 0.25 - torch.eye(4)[torch.arange(m) % 4]
        h = torch.randn(3, generator=generator).expand(m, 3) * 7
        gram = last_layer_gram(h.to(dtype), p.to(dtype))
        picks, weights = solved(gram, gram.mean(1), max(1, m // 3), way)
        assert len(picks) == len(weights) == 0


@pytest.mark.parametrize("way", ["omp", "nonnegative", "swap", "sklearn", "device"])
@pytest.mark.parametrize("dtype", COARSE)
def test_of_near_duplicates_one_is_picked(dtype, way):
    """Twins that differ by less than the numbers' spacing: their difference is no direction to go in."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        gradients = torch.randn(10, 40, generator=generator, dtype=torch.float64).repeat(2, 1)
        eps = torch.finfo(dtype).eps
        gradients[10:] += eps / 8 * torch.randn(10, 40, generator=generator, dtype=torch.float64)
        gram = (gradients @ gradients.T).to(dtype)
        picks, weights = solved(gram, gram.mean(1), 20, way)
        assert len({pick % 10 for pick in picks.tolist()}) == len(picks) == 10
        np.testing.assert_allclose(weights, 0.1, atol=8 * eps)


@settings(max_examples=100, deadline=None)
@given(problems, st.sampled_from(COARSE), st.sampled_from([0.0, 0.1]))
def test_compiled_and_on_a_device_it_is_the_plain_solver(size, dtype, ridge):
    seed, m, d, c, _, spread = size
    h, p, _ = classifier(seed, m, d, c, spread=spread)  # Duplicates tie, and rounding would decide.
    gram = last_layer_gram(h.to(dtype), p.to(dtype)).double()
    precision = Precision.of(torch.finfo(dtype))
    k = max(1, m // 2)
    given_ = Problem(gram.numpy(), gram.mean(1).numpy(), k, ridge * float(gram.diagonal().mean()), precision=precision)
    picks, weights = solve_omp(given_)
    compiled, compiled_weights = solve_compiled(given_)
    assert compiled.tolist() == picks.tolist()
    np.testing.assert_allclose(compiled_weights, weights, rtol=1e-6, atol=1e-9)
    fixed, fixed_weights = fixed_omp(gram, gram.mean(1), k, ridge, precision)
    assert fixed[: len(picks)].tolist() == picks.tolist()
    np.testing.assert_allclose(fixed_weights[: len(picks)], weights, rtol=1e-6, atol=1e-9)
    assert not fixed_weights[len(picks) :].any()


def test_the_coarser_of_matrix_and_target_counts_and_integers_are_exact():
    single, half, double = (torch.finfo(dtype) for dtype in (torch.float32, torch.float16, torch.float64))
    assert Precision.of(double) == Precision.of(np.finfo(np.float64)) == Precision.of() == EXACT
    assert Precision.of(np.finfo(np.longdouble), double) == EXACT
    assert EXACT.dependent == DEPENDENT
    assert Precision.of(double, single) == Precision.of(np.finfo(np.float32))
    assert Precision.of(single, half).eps == half.eps
    assert Precision.of(half).tiny == pytest.approx(2.0**-24)
    gradients = np.random.default_rng(0).integers(-2, 3, (20, 4))
    gram = gradients @ gradients.T
    for array in (gram, gram.astype(np.float64)):
        picks, weights = gram_omp(array, gram.mean(1), 10)
        assert error(gradients, picks, weights) < 1e-20
    # The same numbers as float32 say that they may be rounded, which of these changes nothing.
    assert gram_omp(gram.astype(">f4"), gram.mean(1), 10)[0].tolist() == picks.tolist()
