"""The solvers of a GPU on one; needs no Composer, whose torch can be older than the GPU's driver asks for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from composer_gradmatch import gram_omp, last_layer_gram
from composer_gradmatch.matching.on_device import _loop, fixed_omp
from composer_gradmatch.matching.problem import Problem
from composer_gradmatch.matching.pursuit import solve_omp
from composer_gradmatch.matching.weighted_picks import match_on_device


def gram_of(m, d=None):
    gradients = np.random.default_rng(m).standard_normal((m, d or m + 10))
    return torch.from_numpy(gradients @ gradients.T)


def assert_is_the_hosts(result, gram, k, ridge=0.0):
    penalty = ridge * gram.diagonal().mean().item()
    expected, weights = solve_omp(Problem(gram.numpy(), gram.mean(1).numpy(), k, penalty))
    picks, actual = (tensor.cpu() for tensor in result)
    n = len(expected)
    assert picks[:n].tolist() == expected.tolist()
    np.testing.assert_allclose(actual[:n], weights, rtol=1e-7, atol=1e-12)
    assert not actual[n:].any()
    assert len(set(picks.tolist())) == k


@pytest.mark.parametrize(
    ("m", "k"),
    [(1, 1), (2, 1), (17, 17), (64, 12), (128, 12), (128, 64), (300, 90), (512, 256), (1024, 512), (1500, 60)],
)
@pytest.mark.parametrize("solve", [fixed_omp, _loop])
def test_picks_and_weights_are_the_hosts(solve, m, k):
    gram = gram_of(m)
    on_gpu = gram.cuda()
    assert_is_the_hosts(solve(on_gpu, on_gpu.mean(1), k, 0.0), gram, k)


def test_where_pursuit_stops_early_the_rest_weighs_nothing():
    gram = gram_of(200, 30)
    on_gpu = gram.cuda()
    assert_is_the_hosts(fixed_omp(on_gpu, on_gpu.mean(1), 100), gram, 100)


@pytest.mark.parametrize("solve", [fixed_omp, _loop])
def test_ridge(solve):
    """0.1 is not a number of single precision, in which Triton passes numbers."""
    gram = gram_of(128)
    on_gpu = gram.cuda()
    assert_is_the_hosts(solve(on_gpu, on_gpu.mean(1), 64, 0.1), gram, 64, 0.1)


@pytest.mark.parametrize("solve", [fixed_omp, _loop])
@pytest.mark.parametrize("m", [5, 200, 1024, 1100])
def test_of_equal_samples_the_first_is_picked(solve, m):
    gram = torch.eye(m, dtype=torch.float64, device="cuda")
    picks, _ = solve(gram, torch.ones_like(gram[0]), 5, 0.0)
    assert picks.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("solve", [fixed_omp, _loop])
def test_zeros_give_the_first_samples_with_weight_zero(solve):
    gram = torch.zeros(70, 70, dtype=torch.float64, device="cuda")
    picks, weights = solve(gram, gram[0], 3, 0.0)
    assert picks.tolist() == [0, 1, 2]
    assert weights.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("i", "j"), [(3, 5), (4, 4)])
def test_numbers_that_are_not_finite_give_the_same_legal_picks(value, i, j):
    """Where the kernel and the loop could differ: maxima on a GPU pass over NaN."""
    gram = gram_of(60)
    finite = gram.mean(1).cuda()
    gram[i, j] = gram[j, i] = value
    gram = gram.cuda()
    for target in (gram.mean(1), finite):
        picks, _ = fixed_omp(gram, target, 20)
        assert picks.tolist() == _loop(gram, target, 20, 0.0)[0].tolist()
        assert len(set(picks.tolist())) == 20
        assert all(0 <= pick < 60 for pick in picks.tolist())


def test_the_result_is_the_same_each_time():
    """A thread that read what another had not yet written would tell now and then."""
    gram = gram_of(1000).cuda()
    target = gram.mean(1)
    expected, expected_weights = fixed_omp(gram, target, 300)
    for _ in range(50):
        torch.empty(300 * 1000, dtype=torch.float64, device="cuda").fill_(float("nan"))  # What the kernel gets as Q.
        picks, weights = fixed_omp(gram, target, 300)
        assert torch.equal(picks, expected)
        assert torch.equal(weights, expected_weights)


def test_strides_are_followed_and_inputs_not_modified():
    wide = torch.zeros(90, 180, dtype=torch.float64, device="cuda")
    gram = gram_of(90)
    wide[:, ::2] = gram.cuda()
    target = torch.stack([gram.mean(1)] * 2, dim=1).cuda()[:, 0]
    copies = wide.clone(), target.clone()
    assert_is_the_hosts(fixed_omp(wide[:, ::2], target, 20), gram, 20)
    assert torch.equal(wide, copies[0])
    assert torch.equal(target, copies[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    gram = gram_of(64)
    elsewhere = gram.to("cuda:1")
    with torch.cuda.device(0):
        result = fixed_omp(elsewhere, elsewhere.mean(1), 12)
    assert result[0].device == result[1].device == elsewhere.device
    assert_is_the_hosts(result, gram, 12)


def test_float32():
    gram = gram_of(128)
    on_gpu = gram.float().cuda()
    picks, weights = fixed_omp(on_gpu, on_gpu.mean(1), 12)
    expected, expected_weights = solve_omp(Problem(gram.numpy(), gram.mean(1).numpy(), 12))
    assert picks.tolist() == expected.tolist()
    np.testing.assert_allclose(weights.cpu(), expected_weights, rtol=1e-3)


def test_gram_omp_gives_back_what_it_was_given_on_its_device():
    gram = gram_of(64)
    expected, expected_weights = gram_omp(gram, gram.mean(1), 12)
    for solver in ("omp", "nonnegative"):
        picks, weights = gram_omp(gram.cuda(), gram.mean(1).cuda(), 12, solver=solver)
        assert picks.is_cuda
        assert weights.is_cuda
    picks, weights = gram_omp(gram.cuda(), gram.mean(1).cuda(), 12)
    assert picks.tolist() == expected.tolist()
    torch.testing.assert_close(weights.cpu(), expected_weights)


def test_the_host_waits_for_nothing_from_inputs_and_gradients_to_weights():
    h, p = torch.randn(128, 64, device="cuda").double(), torch.randn(128, 10, device="cuda").double()
    match_on_device(last_layer_gram(h, p), 12)  # Compiles the kernel, and makes handles.
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        match = match_on_device(last_layer_gram(h, p), 12)
        match.metrics(128)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert match.weights.sum().item() == pytest.approx(12)


@pytest.mark.parametrize("solve", [fixed_omp, _loop])
def test_the_host_does_not_wait_for_a_solver(solve):
    gram = gram_of(128).cuda()
    target = gram.mean(1)
    solve(gram, target, 12, 0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = solve(gram, target, 12, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_is_the_hosts(result, gram.cpu(), 12, 0.1)


def test_the_kernel_is_a_single_launch():
    pytest.importorskip("triton")
    gram = gram_of(128).cuda()
    target = gram.mean(1)
    fixed_omp(gram, target, 12)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fixed_omp(gram, target, 12)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1
    assert "_omp_kernel" in kernels[0]


def test_a_cuda_graph_holds_the_loop():
    gram = gram_of(1100).cuda()
    target = gram.mean(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _loop(gram, target, 20, 0.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = _loop(gram, target, 20, 0.0)
    other = gram_of(1100, 2000)
    gram.copy_(other)
    target.copy_(other.mean(1))
    graph.replay()
    assert_is_the_hosts(result, other, 20)
