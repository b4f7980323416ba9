"""Orthogonal matching pursuit as machine code, by numba: the picks of :func:`.solve_omp`, but for duplicates.

Q is kept as its transpose: a row for each sample that is not picked, of its entries in the order of the picks.
The product of a step then streams through exactly the numbers it needs, several rows at a time against one row
of L in the innermost cache, and giving up the picked sample's row is one short copy.
"""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numba
import numpy as np
from numba.core.errors import NumbaError

from composer_gradmatch.matching.problem import DEPENDENT, EXACT, Problem
from composer_gradmatch.matching.pursuit import solve_omp

__all__ = ["solve_compiled"]

#: What kept numba from its work, once it did.
_failures: list[Exception] = []


def _jit(**options: Any) -> Any:
    def decorate(function: Any) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # No folder to write the cache to: compiled once a process.
            return numba.njit(**options)(function)

    return decorate


# Sums may be reordered, which lets them be vectorised; NaN and infinity keep their meaning.
_REORDER = {"reassoc", "contract", "nsz"}


@_jit(fastmath=_REORDER)
def _products(rows: np.ndarray, live: int, vector: np.ndarray, out: np.ndarray) -> None:
    """Computes out[x] = rows[x, :n] · vector for the first ``live`` rows, four at a time."""
    n = len(vector)
    x = 0
    while x + 4 <= live:
        first, second, third, fourth = rows[x], rows[x + 1], rows[x + 2], rows[x + 3]
        a = b = c = d = 0.0
        for i in range(n):
            v = vector[i]
            a += v * first[i]
            b += v * second[i]
            c += v * third[i]
            d += v * fourth[i]
        out[x], out[x + 1], out[x + 2], out[x + 3] = a, b, c, d
        x += 4
    while x < live:
        first = rows[x]
        a = 0.0
        for i in range(n):
            a += vector[i] * first[i]
        out[x] = a
        x += 1


@_jit(fastmath={"nnan", "nsz", "reassoc"})
def _largest(values: np.ndarray) -> float:
    best = -np.inf
    for x in range(len(values)):
        best = max(best, values[x])
    return best


@_jit()
def _floor(diagonal: np.ndarray, target: np.ndarray, faint: float) -> np.ndarray:
    """Tells what :meth:`.Problem.floor` says."""
    norm = np.sqrt(np.maximum(diagonal, 0.0))
    longest = strongest = 0.0
    for x in range(len(norm)):
        if norm[x] > 0:
            longest = max(longest, norm[x])
            strongest = max(strongest, abs(target[x]) / norm[x])
    return max(faint * strongest, 8 * np.finfo(np.float64).eps * longest) * norm


@_jit()
def _omp(
    gram: np.ndarray,
    target: np.ndarray,
    k: int,
    ridge: float,
    enough: float,
    faint: float,
    dependent: float,
    tiny: float,
    exact: bool,
) -> tuple[np.ndarray, np.ndarray]:
    diagonal = np.empty(len(target))
    for x in range(len(target)):
        diagonal[x] = gram[x, x] + ridge
    floor = _floor(diagonal, target, faint)
    order = np.flatnonzero(diagonal > 0)
    live = len(order)
    alpha, least = target[order], floor[order]
    rows = np.empty((live, k))
    # L⁻¹, and a sample's coefficients on the picked: see Pursuit._extend_inverse.
    inverse = np.empty((0, 0)) if exact else np.zeros((k, k))
    coefficients = np.empty(0 if exact else k)
    lower = np.empty((k, k))
    z = np.empty(k)
    product = np.empty(live)
    candidates = np.empty(live)
    picks = np.empty(k, np.int64)
    n = 0
    explained = 0.0
    while n < k and explained < enough and live > 0:
        for x in range(live):
            candidates[x] = alpha[x] if alpha[x] > least[x] else -np.inf
        best = _largest(candidates[:live])
        if best == -np.inf:
            break
        # Rows change places: of equal ones, the sample that comes first in the minibatch.
        at = -1
        for x in range(live):
            if candidates[x] == best and (at < 0 or order[x] < order[at]):
                at = x
        pick = order[at]
        factor = lower[n, :n]
        pivot = gram[pick, pick] + ridge
        for i in range(n):
            factor[i] = rows[at, i]
            pivot -= factor[i] * factor[i]
        if pivot <= dependent * diagonal[pick] + tiny:
            break
        root = np.sqrt(pivot)
        if not exact:
            spread = 0.0
            for i in range(n):
                coefficients[i] = 0.0
            for j in range(n):
                for i in range(j + 1):
                    coefficients[i] += factor[j] * inverse[j, i]
            for i in range(n):
                spread += coefficients[i] * coefficients[i] * diagonal[picks[i]]
            if pivot <= dependent * (diagonal[pick] + spread) + tiny:
                break
            for i in range(n):
                inverse[n, i] = -coefficients[i] / root
            inverse[n, n] = 1.0 / root
        lower[n, n] = root
        z[n] = best / root
        explained += z[n] * z[n]
        picks[n] = pick
        live -= 1
        if at != live:
            order[at], alpha[at], least[at] = order[live], alpha[live], least[live]
            for i in range(n):
                rows[at, i] = rows[live, i]
        _products(rows, live, factor, product)
        for x in range(live):
            entry = (gram[pick, order[x]] - product[x]) / root
            rows[x, n] = entry
            alpha[x] -= z[n] * entry
        n += 1
    weights = z[:n].copy()
    for j in range(n - 1, -1, -1):
        weights[j] /= lower[j, j]
        for i in range(j):
            weights[i] -= lower[j, i] * weights[j]
    return picks[:n], weights


def solve_compiled(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Runs Algorithm 2, picking by the largest signed α; compiled at its first call for each dtype and layout of K.

    Where numba fails, most likely over its cache on disk, warns of it once and goes on in numpy.

    Args:
        problem (Problem): K, t and when to stop.

    Returns:
        tuple: Picks (n,), int64, and weights γ (n,), float64.
    """
    if not _failures:
        try:
            return _omp(
                problem.gram,
                problem.target,
                problem.k,
                problem.ridge,
                problem.enough,
                DEPENDENT,
                problem.precision.dependent,
                4 * problem.precision.tiny,
                problem.precision == EXACT,
            )
        except (OSError, EOFError, pickle.PickleError, NumbaError) as error:
            _failures.append(error)
            warnings.warn(
                f"Matching pursuit could not be compiled ({type(error).__name__}: {error}) and goes on in numpy. If "
                "numba's cache is broken or its disk full, clear it: NUMBA_CACHE_DIR, or the folder __pycache__ beside "
                f"{__file__}.",
                stacklevel=2,
            )
    return solve_omp(problem)
