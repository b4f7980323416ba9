"""Orthogonal matching pursuit in one kernel launch, by Triton.

One program does all of it: M is small, so one launch and one multiprocessor beat hundreds of launches. K and Q
stay in the L2 cache. Threads read what others have written to Q, so each step has its barriers.
"""

# ruff: noqa: ANN001, ANN202 - Triton gives the arguments of a kernel its own types.

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl

from composer_gradmatch.matching.problem import dependence

__all__ = ["omp_in_one_kernel"]

#: Numbers of Q that are read at a time: a tile of earlier rows, of all samples.
_TILE = 8192


@triton.jit
def _omp_kernel(
    gram,
    target,
    rows,
    z,
    pivots,
    picks,
    weights,
    m,
    k,
    row_stride,
    column_stride,
    ridge_high,
    ridge_low,
    DEPENDENCE: tl.constexpr,
    ROUNDING: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    PICKS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    inside = columns < m
    diagonal = tl.load(gram + columns.to(tl.int64) * (row_stride + column_stride), mask=inside, other=0.0)
    mean = tl.sum(diagonal, axis=0) / m
    penalty = ridge_high * mean + ridge_low * mean
    diagonal = tl.where(inside, diagonal + penalty, 0.0)
    norm = tl.sqrt(tl.maximum(diagonal, 0.0))
    alpha = tl.load(target + columns, mask=inside, other=0.0)
    positive = norm > 0.0
    correlation = tl.where(positive, tl.abs(alpha) / tl.where(positive, norm, 1.0), 0.0)
    floor = tl.maximum(DEPENDENCE * tl.max(correlation, axis=0), ROUNDING * tl.max(norm, axis=0)) * norm
    unpicked = inside
    # A maximum passes over NaN on a GPU; the floor it gives would not be one.
    broken = (diagonal != diagonal) | (correlation != correlation)
    active = tl.sum(broken.to(tl.int32), axis=0) == 0
    offsets = tl.arange(0, TILE)

    for j in range(k):
        worth = unpicked & positive & (alpha > floor)
        candidates = tl.where(worth, alpha, -float("inf"))
        best = tl.max(candidates, axis=0)
        active = active & (best > -float("inf"))
        first = tl.min(tl.where(unpicked, columns, COLUMNS), axis=0)
        at = tl.min(tl.where(candidates == best, columns, COLUMNS), axis=0)
        pick = tl.where(active, at, first)

        row = tl.load(
            gram + pick.to(tl.int64) * row_stride + columns.to(tl.int64) * column_stride, mask=inside, other=0.0
        )
        for start in range(0, j, TILE):
            earlier = start + offsets
            before = earlier < j
            factor = tl.load(rows + earlier * m + pick, mask=before, other=0.0)
            tile = tl.load(
                rows + earlier[:, None] * m + columns[None, :], mask=before[:, None] & inside[None, :], other=0.0
            )
            row -= tl.sum(factor[:, None] * tile, axis=0)
        chosen = columns == pick
        pivot = tl.sum(tl.where(chosen, row, 0.0), axis=0) + penalty
        active = active & (pivot > DEPENDENCE * tl.sum(tl.where(chosen, diagonal, 0.0), axis=0))
        # A sample that is dependent ends the pursuit, and is then one of the first that are not picked.
        pick = tl.where(active, pick, first)
        root = tl.sqrt(tl.where(active, pivot, 1.0))
        row = tl.where(active, row / root, 0.0)
        coordinate = tl.where(active, best / root, 0.0)
        alpha -= coordinate * row
        unpicked = unpicked & (columns != pick)
        tl.store(rows + j * m + columns, row, mask=inside)
        tl.store(z + j, coordinate)
        tl.store(pivots + j, root)
        tl.store(picks + j, pick.to(tl.int64))
        tl.debug_barrier()  # The next step reads this row, and other threads wrote it.

    # γ by back substitution, a column of Lᵀ at a time.
    positions = tl.arange(0, PICKS)
    solving = positions < k
    right = tl.load(z + positions, mask=solving, other=0.0)
    for i in range(k):
        j = k - 1 - i
        here = positions == j
        weight = tl.sum(tl.where(here, right, 0.0), axis=0) / tl.load(pivots + j)
        pick = tl.load(picks + j)
        column = tl.load(rows + positions * m + pick, mask=positions < j, other=0.0)
        right = tl.where(here, weight, right - weight * column)
    tl.store(weights + positions, right, mask=solving)


def omp_in_one_kernel(
    gram: torch.Tensor, target: torch.Tensor, k: int, ridge: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs :func:`.fixed_omp` as a single launch.

    Args:
        gram (torch.Tensor): K, shape (M, M), float64 or float32.
        target (torch.Tensor): t, shape (M,), of the same dtype and device.
        k (int): The number of picks, 1 ≤ k ≤ M.
        ridge (float, optional): λ relative to the mean of K's diagonal. Default: ``0.0``.

    Returns:
        tuple: As of :func:`.fixed_omp`.
    """
    m = len(target)
    rows, z, pivots = gram.new_empty(k, m), gram.new_empty(k), gram.new_empty(k)
    weights = gram.new_empty(k)
    picks = torch.empty(k, dtype=torch.int64, device=gram.device)
    eps = torch.finfo(gram.dtype).eps
    columns = max(32, triton.next_power_of_2(m))
    # Triton passes numbers in single precision, of which two hold one in double.
    ridge_high = ctypes.c_float(ridge).value
    with torch.cuda.device_of(gram):  # Triton launches on the current device.
        _omp_kernel[(1,)](
            gram,
            target.contiguous(),
            rows,
            z,
            pivots,
            picks,
            weights,
            m,
            k,
            gram.stride(0),
            gram.stride(1),
            ridge_high,
            ridge - ridge_high,
            DEPENDENCE=dependence(gram.dtype),
            ROUNDING=8 * eps,
            COLUMNS=columns,
            TILE=max(1, min(32, _TILE // columns)),
            PICKS=triton.next_power_of_2(k),
            num_warps=min(16, max(4, columns // 32)),  # pyright: ignore[reportCallIssue]
            # No load may run ahead of a barrier.
            num_stages=1,  # pyright: ignore[reportCallIssue]
        )
    return picks, weights
