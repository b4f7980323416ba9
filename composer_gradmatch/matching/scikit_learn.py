"""scikit-learn's orthogonal matching pursuit, which the paper's experiments ran."""

from __future__ import annotations

import warnings

import numpy as np

from composer_gradmatch.matching.problem import EXACT, Problem
from composer_gradmatch.matching.pursuit import Pursuit

__all__ = ["solve_sklearn"]


def solve_sklearn(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Runs :func:`sklearn.linear_model.orthogonal_mp_gram`, which picks the α of largest magnitude.

    Args:
        problem (Problem): K, t and when to stop.

    Returns:
        tuple: Picks (n,), int64, and weights γ (n,), float64, which may be negative.
    """
    from sklearn.linear_model import orthogonal_mp_gram

    gram, target = problem.gram.astype(np.float64), problem.target
    gram[np.diag_indices_from(gram)] += problem.ridge
    largest = np.diagonal(gram).max()
    if largest <= 0.0 or not target.any() or problem.enough <= 0.0:
        return np.empty(0, dtype=np.int64), np.empty(0)
    # It stops at absolute thresholds: a power of two brings the problem to order one.
    scale = 2.0 ** -np.floor(np.log2(largest))
    with warnings.catch_warnings():
        # "ended prematurely due to linear dependence": the caller sees it in the number of picks.
        warnings.filterwarnings("ignore", "(?s).*Orthogonal matching pursuit ended prematurely", RuntimeWarning)
        path = np.asarray(orthogonal_mp_gram(gram * scale, target * scale, n_nonzero_coefs=problem.k, return_path=True))
    path = path.reshape(len(target), -1)
    if not path.shape[1]:  # Not even a first step: the target is rounding error.
        return np.empty(0, dtype=np.int64), np.empty(0)
    # Least squares explain tᵀγ of ‖ḡ‖².
    small_enough = target @ path >= problem.enough
    if small_enough.any():
        path = path[:, : int(small_enough.argmax()) + 1]
    indices = _in_order(path)
    if problem.precision != EXACT:
        independent = _independent(problem, indices)
        if not independent:
            return np.empty(0, dtype=np.int64), np.empty(0)
        path = path[:, :independent]
        indices = indices[:independent]
    return indices, np.ascontiguousarray(path[indices, -1])


def _in_order(path: np.ndarray) -> np.ndarray:
    """Gives the samples with a weight in a path of solutions, in the order of their first one."""
    first_step = np.where(path.any(axis=1), (path != 0).argmax(axis=1), path.shape[1])
    return np.argsort(first_step, kind="stable")[: int(path.any(axis=1).sum())].astype(np.int64)


def _independent(problem: Problem, picks: np.ndarray) -> int:
    """Gives the number of picks up to the first that depends on those before it by what K's own rounding can tell."""
    pursuit = Pursuit(problem)
    for pick in picks.tolist():
        if not pursuit.add(pick):
            break
    return len(pursuit.picks)
