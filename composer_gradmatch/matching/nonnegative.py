"""Non-negative orthogonal matching pursuit: the weights of each step are the best non-negative ones."""

from __future__ import annotations

import numpy as np

from composer_gradmatch.matching.problem import Problem
from composer_gradmatch.matching.pursuit import Pursuit

__all__ = ["solve_nonnegative"]


def solve_nonnegative(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Runs OMP whose weights solve the non-negative least squares on the picked samples, step by step.

    A sample whose weight becomes zero is not a pick any more, and may be picked again. Nguyen, Soussen, Idier and
    Djermoune, "Non-negative orthogonal greedy algorithms", 2019; the non-negative least squares by the active sets
    of Lawson and Hanson, 1974, each started from the step before.

    Args:
        problem (Problem): K, t and when to stop.

    Returns:
        tuple: Picks (n,), int64, and weights w > 0 (n,), float64.
    """
    pursuit = Pursuit(problem)
    weights, explained = np.empty(0), 0.0
    while not pursuit.done:
        pick = pursuit.best()
        if pick is None or not pursuit.add(pick):
            break
        weights = _nonnegative_weights(pursuit, weights)
        # Each step lowers the error; one that does not has come down to rounding.
        if pursuit.explained <= explained:
            break
        explained = pursuit.explained
    return np.array(pursuit.picks, dtype=np.int64), weights


def _nonnegative_weights(pursuit: Pursuit, before: np.ndarray) -> np.ndarray:
    """Drops picks until the weights of the rest are the non-negative least squares on all of them.

    Args:
        pursuit (Pursuit): Its last pick is new.
        before (np.ndarray): The positive weights of the picks but the last.

    Returns:
        np.ndarray: The weights, all positive, of the picks that are left.
    """
    considered = list(pursuit.picks)
    current = dict(zip(considered, [*before, 0.0], strict=True))
    while True:
        weights = pursuit.weights()
        while len(weights) and weights.min() <= 0:
            feasible = np.array([current[pick] for pick in pursuit.picks])
            negative = weights <= 0
            # As far towards the least squares as all weights stay non-negative.
            ratios = np.divide(feasible, feasible - weights, out=np.ones(len(weights)), where=negative & (feasible > 0))
            ratios[negative & (feasible <= 0)] = 0.0
            step = ratios[negative].min()
            moved = feasible + step * (weights - feasible)
            dropped = negative & (ratios <= step)
            current = {p: w for p, w, gone in zip(pursuit.picks, moved.tolist(), dropped, strict=True) if not gone}
            while not pursuit.restart(list(current)):
                current.popitem()  # Within rounding of dependence, another order of the picks may tip the scales.
            weights = pursuit.weights()
        current = dict(zip(pursuit.picks, weights.tolist(), strict=True))
        entering = pursuit.best(considered)
        explained = pursuit.explained
        if entering is None or not pursuit.add(entering):
            return weights
        if pursuit.explained <= explained:
            pursuit.restart(list(current))
            return weights
        current[entering] = 0.0
