"""Orthogonal matching pursuit that never asks the device for a value, so that the host need not wait for it."""

from __future__ import annotations

import torch

from composer_gradmatch.matching.problem import EXACT, Precision, dependence

__all__ = ["fixed_omp"]

#: The largest M that the kernel of one program takes.
_LARGEST = 1024


@torch.no_grad()
def fixed_omp(
    gram: torch.Tensor, target: torch.Tensor, k: int, ridge: float = 0.0, precision: Precision = EXACT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs Algorithm 2 with exactly ``k`` picks, some of weight zero where :func:`.solve_omp` would stop early.

    On a GPU one kernel for M ≤ 1024, if Triton is installed and K is exact; otherwise a fixed sequence of operations
    on fixed shapes, which a CUDA graph can hold.

    Args:
        gram (torch.Tensor): K, shape (M, M), float64 or float32, which is also the precision of the arithmetic; finite
            or not. Not modified.
        target (torch.Tensor): t, shape (M,), of the same dtype and device. Not modified.
        k (int): The number of picks, 1 ≤ k ≤ M.
        ridge (float, optional): λ relative to the mean of K's diagonal. Default: ``0.0``.
        precision (Precision, optional): How exactly K and t were given, where their dtype is a wider one.
            Default: that of float64.

    Returns:
        tuple: Distinct picks, int64, shape (k,), and weights γ, shape (k,), on the device of ``gram``. Once the pursuit
        stops, the picks are the first samples that are not picked yet, and their weights zero.
    """
    if gram.is_cuda and len(target) <= _LARGEST and precision == EXACT:
        try:
            from composer_gradmatch.matching.one_kernel import omp_in_one_kernel
        except ImportError:  # No Triton on this platform.
            pass
        else:
            return omp_in_one_kernel(gram, target, k, ridge)
    return _loop(gram, target, k, ridge, precision)


def _loop(
    gram: torch.Tensor, target: torch.Tensor, k: int, ridge: float, precision: Precision = EXACT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the partial Cholesky form of :class:`.Pursuit`, with a flag for whether it is still going on."""
    m, faint = len(target), dependence(gram.dtype)
    dependent, tiny = max(faint, precision.dependent), 4 * precision.tiny
    penalty = ridge * gram.diagonal().mean()
    diagonal = gram.diagonal() + penalty
    norm = diagonal.clamp(min=0).sqrt()
    correlation = torch.where(norm > 0, target / norm, 0.0).abs().amax()
    rounding = 8 * torch.finfo(gram.dtype).eps * norm.amax()
    floor = torch.maximum(faint * correlation, rounding) * norm

    alpha = target.clone()
    rows = gram.new_zeros(k, m)
    z = gram.new_zeros(k)
    picks = torch.zeros(k, dtype=torch.int64, device=gram.device)
    unpicked = torch.ones(m, dtype=torch.bool, device=gram.device)
    active = torch.ones((), dtype=torch.bool, device=gram.device)
    pivots = gram.new_ones(k)
    inverse = None if precision == EXACT else gram.new_zeros(k, k)  # L⁻¹: see Pursuit._extend_inverse.
    for j in range(k):
        worth = unpicked & (norm > 0) & (alpha > floor)
        best, at = torch.where(worth, alpha, -torch.inf).max(0)
        active = active & (best > -torch.inf)
        pick = torch.where(active, at, unpicked.to(torch.uint8).argmax()).view(1)
        row = gram.index_select(0, pick)[0]
        if j:
            row = row - rows[:j].index_select(1, pick)[:, 0] @ rows[:j]
        pivot = row.index_select(0, pick) + penalty
        spread = diagonal.index_select(0, pick)
        coefficients = None
        if inverse is not None:
            coefficients = rows[:j].index_select(1, pick)[:, 0] @ inverse[:j]
            spread = spread + (coefficients[:j] ** 2 * diagonal.index_select(0, picks[:j])).sum()
        active = active & (pivot > dependent * spread + tiny)[0]
        # A sample that is dependent ends the pursuit, and is then one of the first that are not picked.
        pick = torch.where(active, pick, unpicked.to(torch.uint8).argmax())
        root = torch.where(active, pivot, 1.0).sqrt()
        row = torch.where(active, row / root, 0.0)
        z[j : j + 1] = torch.where(active, alpha.index_select(0, pick) / root, 0.0)
        pivots[j : j + 1] = root
        if inverse is not None and coefficients is not None:
            inverse[j] = torch.where(active, -coefficients / root, 0.0)
            inverse[j, j] = torch.where(active, 1 / root[0], 0.0)
        rows[j] = row
        alpha = alpha - z[j] * row
        unpicked = unpicked.index_fill(0, pick, False)
        picks[j : j + 1] = pick
    factor = rows.index_select(1, picks).triu(1) + pivots.diag()
    return picks, torch.linalg.solve_triangular(factor, z[:, None], upper=True)[:, 0]
