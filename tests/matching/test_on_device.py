"""Matching pursuit without host synchronisation, against the solver on the host."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_host_sync import HostSyncError, NoHostSync

from composer_gradmatch.matching.gram_omp import _solve_on_device
from composer_gradmatch.matching.on_device import fixed_omp
from composer_gradmatch.matching.problem import Problem
from composer_gradmatch.matching.pursuit import solve_omp
from composer_gradmatch.matching.weighted_picks import match_mean_gradient, match_on_device


def random_gram(m, d, seed=0):
    gradients = torch.from_numpy(np.random.default_rng(seed).standard_normal((m, d)))
    return gradients @ gradients.T


def assert_equals_host(gram, k, ridge=0.0, rtol=1e-7):
    target = gram.mean(1)
    given_ = gram.clone(), target.clone()
    picks, weights = fixed_omp(gram, target, k, ridge)
    assert torch.equal(gram, given_[0])
    assert torch.equal(target, given_[1])
    penalty = ridge * gram.diagonal().mean().item()
    expected, expected_weights = solve_omp(Problem(gram.numpy(), target.numpy(), k, penalty))
    n = len(expected)
    assert picks[:n].tolist() == expected.tolist()
    np.testing.assert_allclose(weights[:n].numpy(), expected_weights, rtol=rtol, atol=1e-12)
    assert picks.shape == weights.shape == (k,)
    assert not weights[n:].any()
    assert len(set(picks.tolist())) == k
    rest = sorted(set(range(len(gram))) - set(expected.tolist()))
    assert picks[n:].tolist() == rest[: k - n]


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize(("m", "d", "k"), [(1, 3, 1), (8, 20, 8), (60, 80, 20), (128, 650, 64), (300, 700, 30)])
def test_picks_and_weights_are_the_hosts(m, d, k, ridge):
    assert_equals_host(random_gram(m, d, seed=m), k, ridge)


def test_where_pursuit_stops_early_the_rest_are_the_first_samples_left_with_weight_zero():
    assert_equals_host(random_gram(40, 5), 30)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert_equals_host(opposite @ opposite.T, 3)
    assert_equals_host(torch.zeros(4, 4, dtype=torch.float64), 3)


def test_duplicates_are_picked_once():
    gradients = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 10)))
    gradients[4] = gradients[1]
    assert_equals_host(gradients @ gradients.T, 6)


def test_what_lies_within_rounding_of_a_pick_is_dependent_on_it():
    gradients = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 10))).repeat(2, 1)
    gradients[5:] += 1e-7 * torch.from_numpy(np.random.default_rng(1).standard_normal((5, 10)))
    _, weights = fixed_omp(gradients @ gradients.T, (gradients @ gradients.T).mean(1), 10)
    assert (weights != 0).sum() == 5


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 8), st.integers(1, 12), st.integers(-12, 12))
def test_any_problem_gives_distinct_picks_and_the_hosts_error(seed, m, d, k, exponent):
    gradients = np.random.default_rng(seed).integers(-2, 3, (m, d)) * 10.0**exponent
    gram = torch.from_numpy(gradients @ gradients.T)
    picks, weights = fixed_omp(gram, gram.mean(1), min(k, m))
    assert len(set(picks.tolist())) == len(picks) == min(k, m)
    expected, expected_weights = solve_omp(Problem(gram.numpy(), gram.mean(1).numpy(), min(k, m)))
    mean = gradients.mean(0)
    # Ties may be decided by rounding; samples that tie in the first step give the same error only there.
    assert np.sum((gradients[picks.numpy()].T @ weights.numpy() - mean) ** 2) <= mean @ mean * (1 + 1e-9)
    if picks[: len(expected)].tolist() == expected.tolist():
        np.testing.assert_allclose(
            gradients[picks.numpy()].T @ weights.numpy(),
            gradients[expected].T @ expected_weights,
            atol=1e-6 * abs(mean).max(),
        )


def test_float32_is_taken_at_its_own_precision():
    gram = random_gram(50, 90, seed=4)
    expected = fixed_omp(gram, gram.mean(1), 10)
    picks, weights = fixed_omp(gram.float(), gram.mean(1).float(), 10)
    assert weights.dtype == torch.float32
    assert picks.tolist() == expected[0].tolist()
    torch.testing.assert_close(weights.double(), expected[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_give_legal_picks_of_weight_one(value):
    gram = random_gram(12, 20)
    gram[3, 5] = gram[5, 3] = value
    match = match_on_device(gram, 4)
    assert len(set(match.indices.tolist())) == 4
    assert match.weights.tolist() == [1.0] * 4
    assert not match.found


def test_the_match_is_the_hosts_but_for_samples_of_weight_zero():
    for seed, (m, d, k) in enumerate([(40, 60, 10), (40, 5, 20), (30, 25, 30)]):
        gram = random_gram(m, d, seed)
        expected, match = match_mean_gradient(gram, k), match_on_device(gram, k)
        assert expected is not None
        positive = match.weights > 0
        assert match.found
        assert match.indices[positive].tolist() == expected.indices.tolist()
        assert match.weights.sum().item() == pytest.approx(k)
        torch.testing.assert_close(
            match.weights[positive] / match.weights.sum(), expected.weights / expected.weights.sum()
        )
        for name, value in expected.metrics(m).items():
            torch.testing.assert_close(match.metrics(m)[name], value, rtol=1e-6, atol=1e-9)


def test_the_host_waits_for_nothing():
    """On tensors without values, of a device of their own, so that a copy to the host is seen, too."""
    with NoHostSync():
        gram = torch.empty(64, 64, dtype=torch.float64, device="meta")
        match = match_on_device(gram, 12, ridge=0.1)
        assert match.indices.shape == match.weights.shape == (12,)
        assert match.weights.device.type == "meta"
        match.metrics(64)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.tolist(),
        lambda x: x.unique(),
        lambda x: x.equal(x),
        lambda x: 1 if x.any() else 0,
        lambda x: torch.arange(5, device=x.device).repeat_interleave(x.long()),
        lambda x: torch.linalg.cholesky(x.diag()),
        lambda x: x.cpu(),
        lambda x: x[torch.zeros(2, dtype=torch.int64, device="cpu")],
        lambda x: torch.zeros(5).to(x.device),
    ],
)
def test_this_can_fail(wait):
    with pytest.raises(HostSyncError), NoHostSync():
        wait(torch.ones(5, device="meta"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_garbage_gives_legal_distinct_picks(value, dtype):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        gram = torch.from_numpy(rng.standard_normal((9, 9))).to(dtype)
        gram[torch.from_numpy(rng.random((9, 9)) < rng.choice([0.02, 0.2, 1.0]))] = value
        target = gram.mean(1) if seed % 2 else torch.from_numpy(rng.standard_normal(9)).to(dtype)
        picks, _ = fixed_omp(gram, target, 9, ridge=seed % 3 / 10)
        assert sorted(picks.tolist()) == list(range(9))


@pytest.mark.parametrize(("m", "d", "k"), [(40, 60, 12), (40, 5, 30), (4, 0, 2)])
def test_gram_omp_of_a_gpu_leaves_out_what_weighs_nothing(m, d, k):
    gram = random_gram(m, d)
    picks, weights = _solve_on_device(gram, gram.mean(1), k, 0.0)
    expected, expected_weights = solve_omp(Problem(gram.numpy(), gram.mean(1).numpy(), k))
    assert picks.tolist() == expected.tolist()
    np.testing.assert_allclose(weights.numpy(), expected_weights, rtol=1e-7)


class OfGPU(torch.Tensor):
    is_cuda = True


def test_without_triton_a_gpu_takes_the_loop(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "composer_gradmatch.matching.one_kernel", raising=False)
    with pytest.raises(ImportError):
        import_module("composer_gradmatch.matching.one_kernel")
    gram = random_gram(30, 40)
    expected, expected_weights = fixed_omp(gram, gram.mean(1), 9)
    picks, weights = fixed_omp(gram.as_subclass(OfGPU), gram.mean(1), 9)
    assert picks.tolist() == expected.tolist()
    assert weights.tolist() == expected_weights.tolist()
