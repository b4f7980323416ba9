"""Runs in a process of its own, in which Triton interprets its kernels: compares them with the loop on the host."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from composer_gradmatch.matching.on_device import fixed_omp
from composer_gradmatch.matching.one_kernel import omp_in_one_kernel


def compare(name, gram, k, ridge=0.0, rtol=1e-9, target=None):
    target = gram.mean(1) if target is None else target
    copies = gram.clone(), target.clone()
    expected, expected_weights = fixed_omp(gram, target, k, ridge)
    picks, weights = omp_in_one_kernel(gram, target, k, ridge)
    assert picks.tolist() == expected.tolist(), name
    assert weights.dtype == gram.dtype, name
    np.testing.assert_allclose(weights, expected_weights, rtol=rtol, atol=1e-12, err_msg=name)
    assert torch.equal(torch.nan_to_num(gram), torch.nan_to_num(copies[0])), name
    assert torch.equal(torch.nan_to_num(target), torch.nan_to_num(copies[1])), name
    print(name, "equal")


def gram_of(m, d):
    gradients = torch.from_numpy(np.random.default_rng(m).standard_normal((m, d)))
    return gradients @ gradients.T


for m, d, k in [(1, 3, 1), (8, 20, 8), (60, 80, 20), (128, 650, 64), (300, 400, 12), (1024, 1100, 10)]:
    compare(f"M={m}", gram_of(m, d), k)
compare("ridge", gram_of(40, 50), 12, ridge=0.1)
compare("ridge and duplicates", gram_of(10, 5).repeat(2, 2), 16, ridge=0.1)
compare("early stop", gram_of(40, 5), 30)
compare("zeros", torch.zeros(6, 6, dtype=torch.float64), 4)
compare("float32", gram_of(50, 90).float(), 10, rtol=1e-4)
compare("strided", gram_of(30, 40).repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2], 9)
compare("ridge of float32", gram_of(40, 50).float(), 12, ridge=0.1, rtol=1e-4)
for value in (float("nan"), float("inf")):
    for i, j in [(3, 5), (4, 4)]:
        broken = gram_of(12, 20)
        broken[i, j] = broken[j, i] = value
        compare(f"{value} at {i}, {j}", broken, 4)
        compare(f"{value} at {i}, {j}, not in the target", broken, 4, target=gram_of(12, 20).mean(1))
