"""Orthogonal matching pursuit, refined by exchanging picked for unpicked samples."""

from __future__ import annotations

import numpy as np
import torch

from composer_gradmatch.matching.problem import Problem
from composer_gradmatch.matching.pursuit import Pursuit, pursue

__all__ = ["solve_swap"]


def solve_swap(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Runs OMP, then makes the exchange of one pick that lowers the error most, again and again until none does.

    A sample comes in only with a positive weight, as in OMP. There are at most k exchanges, each of which takes about
    M·k² multiply-adds: a few milliseconds in all at M = 128, seconds at M = 1024.

    Args:
        problem (Problem): K, t and when to stop.

    Returns:
        tuple: Picks (n,), int64, those exchanged in the place of what they came for, and weights γ (n,), float64.
    """
    pursuit = pursue(problem)
    gain, rounding = pursuit.gain()
    for _ in range(problem.k):
        exchange = _best_exchange(pursuit)
        if exchange is None:
            break
        position, entering = exchange
        exchanged = Pursuit(problem)
        picks = [*pursuit.picks[:position], entering, *pursuit.picks[position + 1 :]]
        if not exchanged.restart(picks):
            break
        new_gain, new_rounding = exchanged.gain()
        if new_gain - new_rounding <= gain + rounding:
            break  # Among near-dependent samples, rounding promised a gain that is none.
        pursuit, gain, rounding = exchanged, new_gain, new_rounding
    return np.array(pursuit.picks, dtype=np.int64), pursuit.weights()


def _best_exchange(pursuit: Pursuit) -> tuple[int, int] | None:
    """Gives the position of the pick to give up and the sample to take for it, or None if no exchange lowers the error.

    With B = K'[I, I]⁻¹, the part of pick p that the others do not explain is the unit vector
    e_p = Σᵢ gᵢBᵢₚ/√Bₚₚ. Without p the error is larger by γₚ²/Bₚₚ; a sample i then lowers it by α'²/d', with
    α' = αᵢ + (γₚ/√Bₚₚ)·(e_pᵀgᵢ) and d' what is left of ‖gᵢ‖² outside the span of the others.
    """
    n = len(pursuit.picks)
    unpicked = np.setdiff1d(np.flatnonzero(pursuit.diagonal > 0), pursuit.picks)
    if not n or not len(unpicked):
        return None
    rows = pursuit.rows
    upper = torch.from_numpy(pursuit.factor)
    right = torch.from_numpy(np.concatenate([rows[:, unpicked], np.eye(n)], axis=1))
    solved = torch.linalg.solve_triangular(upper, right, upper=True).numpy()
    root = np.sqrt((solved[:, len(unpicked) :] ** 2).sum(axis=1))  # √Bₚₚ
    along = solved[:, : len(unpicked)] / root[:, None]
    lost = pursuit.weights() / root
    alpha = pursuit.alpha[unpicked] + lost[:, None] * along
    outside = pursuit.diagonal[unpicked] - (rows[:, unpicked] ** 2).sum(axis=0) + along**2
    worth = (alpha > pursuit.floor[unpicked]) & (outside > pursuit.least_pivots[unpicked])
    gain = np.divide(alpha**2, outside, out=np.full_like(alpha, -np.inf), where=worth) - (lost**2)[:, None]
    position, column = np.unravel_index(int(gain.argmax()), gain.shape)
    if gain[position, column] <= pursuit.problem.precision.dependent * pursuit.explained:
        return None
    return int(position), int(unpicked[column])
