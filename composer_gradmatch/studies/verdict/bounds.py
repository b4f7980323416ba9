"""Looking at paired differences several times without saying more that is wrong: group-sequential t-intervals.

Where differences between paired runs are normal, Student's statistics at the looks have a joint distribution that
depends on neither mean nor spread. So the levels at which all looks together miss the mean with a given probability
can be had by simulating it once, at any number of seeds, however small; the tables of the field are for known spreads
(Jennison and Turnbull, Group Sequential Methods, 2000, chapters 2 and 11). No package on PyPI that is kept up has these
bounds for a spread that is estimated from a handful of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

__all__ = ["LOOKS", "further_seeds", "nominal_level"]

#: Numbers of seeds at which it is looked; each about half as many again as the last.
LOOKS = (5, 8, 12, 18, 27, 40, 60)
_PATHS = 200_000
_FARTHEST = 10_000


def _weights(looks: Sequence[int]) -> np.ndarray:
    """Relative levels, shape (looks,): the square root of n keeps the error for where there is something to see."""
    return np.sqrt(np.asarray(looks, dtype=float) / looks[-1])


@lru_cache
def _extremes(looks: tuple[int, ...]) -> np.ndarray:
    """Simulates where nothing differs: the least p-value over the looks, each by its weight, sorted, shape (paths,)."""
    rng = np.random.default_rng(0)
    total, squares, before = np.zeros(_PATHS), np.zeros(_PATHS), 0
    least = np.full(_PATHS, np.inf)
    for n, weight in zip(looks, _weights(looks), strict=True):
        more = n - before
        # The sum, and the sum of squares, of so many standard normal differences.
        sums = rng.standard_normal(_PATHS) * more**0.5
        within = rng.chisquare(more - 1, _PATHS) if more > 1 else 0.0
        total, squares, before = total + sums, squares + within + sums**2 / more, n
        variance = (squares - total**2 / n) / (n - 1)
        p_values = 2 * stats.t.sf(np.abs(total / n) / np.sqrt(variance / n), n - 1)
        least = np.minimum(least, p_values / weight)
    return np.sort(least)


def nominal_level(alpha: float, seeds: int, looks: tuple[int, ...] = LOOKS) -> float:
    """Gives the level of the interval at a look, so that over all looks one misses with at most ``alpha``.

    The simulation's own error is taken off, by two of its standard deviations; where it has too few paths for a very
    small ``alpha``, that is divided among the looks instead.

    Args:
        alpha (float): In (0, 1).
        seeds (int): n: that of the look, or, between and behind looks, of the next one or the last.
        looks (tuple[int, ...], optional): In increasing order, the first at least 2. Default: :data:`LOOKS`.
    """
    weights = _weights(looks)
    look = min(int(np.searchsorted(looks, seeds)), len(looks) - 1)
    expected = alpha * _PATHS
    if expected < 25:
        return float(alpha * weights[look] / weights.sum())
    return float(_extremes(looks)[int(expected - 2 * expected**0.5)] * weights[look])


def further_seeds(distance: float, spread: float, seeds: int, alpha: float) -> int | None:
    """Estimates how many more seeds would narrow an interval to a distance, if mean and spread stay what they are.

    Args:
        distance (float): From the mean to the nearest bound that decides.
        spread (float): Standard deviation of the paired differences.
        seeds (int): Those there are.
        alpha (float): As for :func:`nominal_level`.

    Returns:
        int: More seeds, counted to the look that would decide; None if 10,000 would not.
    """
    candidates = [n for n in (*LOOKS, *(int(LOOKS[-1] * 1.5**i) for i in range(1, 13))) if n > seeds]
    for n in candidates:
        if n <= _FARTHEST and stats.t.isf(nominal_level(alpha, n) / 2, n - 1) * spread / n**0.5 < distance:
            return n - seeds
    return None
