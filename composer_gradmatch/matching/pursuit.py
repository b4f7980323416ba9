"""Orthogonal matching pursuit as a partial pivoted Cholesky factorisation, in plain numpy."""

from __future__ import annotations

import numpy as np
import torch

from composer_gradmatch.matching.problem import EXACT, Problem

__all__ = ["Pursuit", "pursue", "solve_omp"]


class Pursuit:
    """Picked samples, and what of ḡ they do not explain yet.

    Row j of ``rows`` is row j of Q = L⁻¹K[I, :], where K'[I, I] = LLᵀ, so one product and one rank-one update
    serve each pick, and α = t − Qᵀz with z = L⁻¹t[I]. L is the transpose of Q's picked columns.

    Args:
        problem (Problem): K, t and when to stop.

    Attributes:
        picks (list[int]): I, in the order picked.
        alpha (np.ndarray): α, the samples' inner products with the residual, shape (M,); of no meaning for the
            picked ones.
    """

    def __init__(self, problem: Problem) -> None:
        m = len(problem.target)
        self.problem = problem
        self.diagonal, self.floor = problem.diagonal(), problem.floor()
        self.least_pivots = problem.least_pivots()
        self.picks: list[int] = []
        self.alpha = problem.target.copy()
        self._rows = np.empty((problem.k, m))
        self._z = np.empty(problem.k)
        # L⁻¹, which is wanted only where the rounding of K's entries adds up to more than that of the arithmetic.
        self._inverse = None if problem.precision == EXACT else np.zeros((problem.k, problem.k))
        self._open = self.diagonal > 0

    @property
    def rows(self) -> np.ndarray:
        """Q, shape (n, M); for the samples that are not picked, and lower triangular zeros for those that are."""
        return self._rows[: len(self.picks)]

    @property
    def factor(self) -> np.ndarray:
        """Lᵀ, shape (n, n), upper triangular but for rounding."""
        return self.rows[:, self.picks]

    @property
    def explained(self) -> float:
        """‖z‖², by which the picks lower the error from ‖ḡ‖²."""
        z = self._z[: len(self.picks)]
        return float(z @ z)

    @property
    def done(self) -> bool:
        """Whether there are as many picks as may be, or the error is small enough."""
        return len(self.picks) >= self.problem.k or self.explained >= self.problem.enough

    def best(self, among: list[int] | None = None) -> int | None:
        """Gives the sample, not picked yet, of the largest α that is worth picking; None if there is none."""
        allowed = self._open & (self.alpha > self.floor)
        if among is not None:
            some = np.zeros(len(allowed), dtype=bool)
            some[among] = True
            allowed &= some
        candidates = np.where(allowed, self.alpha, -np.inf)
        best = int(np.argmax(candidates))
        return best if candidates[best] > -np.inf else None

    def add(self, pick: int) -> bool:
        """Picks a sample; False, and nothing done, if it is linearly dependent on the picked ones."""
        n = len(self.picks)
        row = self.problem.gram[pick] - self._rows[:n, pick] @ self._rows[:n]
        pivot = row[pick] + self.problem.ridge
        if pivot <= self.least_pivots[pick] or not self._extend_inverse(pick, pivot):
            return False
        row[pick] = pivot
        row /= np.sqrt(pivot)
        self._rows[n] = row
        self._z[n] = self.alpha[pick] / row[pick]
        self.alpha -= self._z[n] * row
        self._open[pick] = False
        self.picks.append(pick)
        return True

    def _extend_inverse(self, pick: int, pivot: float) -> bool:
        """Gives L⁻¹ the row of one more pick; False if the rounding of K's entries may be all that is left of it."""
        if self._inverse is None:
            return True
        n = len(self.picks)
        before = self._inverse[:n, :n]
        coefficients = self._rows[:n, pick] @ before  # c, the pick's best match among those before it.
        spread = coefficients**2 @ self.diagonal[self.picks]
        if pivot <= self.least_pivots[pick] + self.problem.precision.dependent * spread:
            return False
        self._inverse[n, :n], self._inverse[n, n] = -coefficients, 1.0
        self._inverse[n, : n + 1] /= np.sqrt(pivot)
        return True

    def restart(self, picks: list[int]) -> bool:
        """Picks these samples in place of the present ones; False, and nothing done, if they are dependent."""
        gram, target = self.problem.gram, self.problem.target
        square = gram[np.ix_(picks, picks)] + self.problem.ridge * np.eye(len(picks))
        lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(square.astype(np.float64)))
        if failed or (lower.diagonal().numpy() ** 2 <= self.least_pivots[picks]).any():
            return False
        if self._inverse is not None:
            inverse = torch.linalg.solve_triangular(
                lower, torch.eye(len(picks), dtype=lower.dtype), upper=False
            ).numpy()
            # The condition of _extend_inverse for each of them, divided by its pivot.
            if (self.problem.precision.dependent * inverse**2 @ self.diagonal[picks] >= 1).any():
                return False
            self._inverse[: len(picks), : len(picks)] = inverse
        right = np.concatenate([gram[picks], target[picks][:, None]], axis=1).astype(np.float64)
        solved = torch.linalg.solve_triangular(lower, torch.from_numpy(right), upper=False).numpy()
        n = len(picks)
        self._rows[:n], self._z[:n] = solved[:, :-1], solved[:, -1]
        self._rows[:n, picks] = lower.mT.numpy()
        self._open = self.diagonal > 0
        self._open[picks] = False
        self.picks = list(picks)
        self.alpha = target - self._z[:n] @ self._rows[:n]
        return True

    def gain(self) -> tuple[float, float]:
        """Tells how much γ lowers the error from ‖ḡ‖², also for near-dependent picks, and what of it is rounding."""
        weights, picks = self.weights(), self.picks
        square = self.problem.gram[np.ix_(picks, picks)].astype(np.float64)
        square[np.diag_indices_from(square)] += self.problem.ridge
        gain = 2 * weights @ self.problem.target[picks] - weights @ square @ weights
        magnitude = np.abs(weights) @ np.abs(square) @ np.abs(weights)
        return float(gain), float(16 * self.problem.precision.eps * magnitude)

    def weights(self) -> np.ndarray:
        """Solves γ = K'[I, I]⁻¹t[I], shape (n,)."""
        right = torch.from_numpy(self._z[: len(self.picks), None])
        return torch.linalg.solve_triangular(torch.from_numpy(self.factor), right, upper=True)[:, 0].numpy()


def pursue(problem: Problem) -> Pursuit:
    """Picks the sample of the largest signed α for as long as there is something to gain."""
    pursuit = Pursuit(problem)
    while not pursuit.done:
        pick = pursuit.best()
        if pick is None or not pursuit.add(pick):
            break
    return pursuit


def solve_omp(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Runs Algorithm 2, picking by the largest signed α.

    Args:
        problem (Problem): K, t and when to stop.

    Returns:
        tuple: Picks (n,), int64, and weights γ (n,), float64.
    """
    pursuit = pursue(problem)
    return np.array(pursuit.picks, dtype=np.int64), pursuit.weights()
