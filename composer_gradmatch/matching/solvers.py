"""The solvers: a table of their names, and any function of a :class:`.Problem`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch

from composer_gradmatch.matching.problem import Problem

__all__ = ["SOLVERS", "Solver", "check_solver", "is_number", "solve"]

#: Picks (n,) with n <= k and as many weights.
Solve = Callable[[Problem], tuple[Any, Any]]
Solver = Literal["omp", "nonnegative", "swap", "sklearn"] | Solve

#: A solver's name and its function in this folder, loaded when it is first used.
SOLVERS: dict[str, str] = {
    "omp": "omp.solve_fastest",
    "nonnegative": "nonnegative.solve_nonnegative",
    "swap": "swap.solve_swap",
    "sklearn": "scikit_learn.solve_sklearn",
}


def check_solver(solver: Solver, ridge: float, tolerance: float) -> None:
    """Checks what chooses a solver.

    Args:
        solver (str | Callable): See :func:`.gram_omp`.
        ridge (float): See :func:`.gram_omp`.
        tolerance (float): See :func:`.gram_omp`.

    Raises:
        ValueError: If one is out of range.
    """
    if not (callable(solver) or (isinstance(solver, str) and solver in SOLVERS)):
        raise ValueError(f"solver must be a function of a Problem, or one of {', '.join(SOLVERS)}; got {solver!r}.")
    if not (is_number(ridge) and 0 <= ridge < float("inf")):
        raise ValueError(f"ridge must be a number >= 0, a share of the mean squared gradient norm; got {ridge!r}.")
    if not (is_number(tolerance) and 0 <= tolerance < 1):
        raise ValueError(f"tolerance must be in [0, 1), a share of the squared norm to match; got {tolerance!r}.")


def is_number(value: object) -> bool:
    """Tells whether a value is a real number, which ``True`` is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def solve(problem: Problem, solver: Solver) -> tuple[np.ndarray, np.ndarray]:
    """Solves a problem by a named solver, or by a function, whose answer is checked.

    Args:
        problem (Problem): K, t and when to stop.
        solver (str | Callable): A name in :data:`SOLVERS`, or a function of a problem.

    Returns:
        tuple: Picks (n,), int64, and weights (n,), float64.

    Raises:
        TypeError: If a function does not return a pair.
        ValueError: If a function returns what is not distinct picks and a finite weight for each.
    """
    if isinstance(solver, str):
        return _load(solver)(problem)
    # A view of the caller's own numbers, which nobody may change.
    gram, target = problem.gram.view(), problem.target.view()
    gram.flags.writeable = target.flags.writeable = False
    return _checked(solver(replace(problem, gram=gram, target=target)), problem, solver)


@cache
def _load(name: str) -> Solve:
    module, function = SOLVERS[name].split(".")
    return getattr(import_module(f"{__package__}.{module}"), function)


def _checked(answer: Any, problem: Problem, solver: Solve) -> tuple[np.ndarray, np.ndarray]:
    name = f"The solver {getattr(solver, '__name__', type(solver).__name__)}"
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise TypeError(f"{name} must return a pair of picks and weights; got {type(answer).__name__}.")
    picks, weights = map(_array, answer)
    m, k = len(problem.target), problem.k
    if picks.ndim != 1 or picks.shape != weights.shape or len(picks) > k:
        raise ValueError(
            f"{name} must return at most k={k} picks and a weight for each; got shapes {picks.shape} and "
            f"{weights.shape}."
        )
    if not len(picks):
        return np.empty(0, dtype=np.int64), np.empty(0)
    if picks.dtype.kind not in "iu" or picks.min() < 0 or picks.max() >= m:
        raise ValueError(f"{name} must pick by integers in [0, {m}), one for each sample; got {picks} ({picks.dtype}).")
    if len(np.unique(picks)) < len(picks):
        raise ValueError(f"{name} must pick no sample twice; got {picks}.")
    if weights.dtype.kind not in "iuf" or not np.isfinite(weights).all():
        raise ValueError(f"{name} must return finite, real weights; got {weights} ({weights.dtype}).")
    return picks.astype(np.int64), weights.astype(np.float64)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
