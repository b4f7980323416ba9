"""Paired differences with their intervals, and what they allow to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = [
    "Difference",
    "compare_at_cost",
    "compare_paired",
    "interval_of_median",
    "ratio_of_means",
    "what_seeds_can_tell",
]


@dataclass(frozen=True)
class Difference:
    """A mean paired difference.

    Attributes:
        mean (float): The mean over pairs.
        low (float): Lower end of the interval, of 95 % unless told otherwise; NaN if the pairs cannot give one.
        high (float): Its upper end.
        pairs (int): How many.
    """

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"`` or ``"not distinguishable"``: whether the interval excludes zero."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not distinguishable"

    def __str__(self) -> str:
        if self.pairs == 0:
            return "no pairs"
        mean, low, high = (f"{round(value, 4) + 0.0:+.4f}" for value in (self.mean, self.low, self.high))
        return f"{mean} (no interval)" if np.isnan(self.low) else f"{mean} [{low}, {high}]"


def compare_paired(differences: Sequence[float], level: float = 0.05, least_spread: float = 0.0) -> Difference:
    """Gives the mean of paired differences with Student's interval.

    A single pair gives no interval, nor do pairs that all differ by the same amount, unless a least spread is given:
    there is nothing to judge by.

    Args:
        differences (Sequence[float]): One for each pair (seed).
        level (float, optional): The probability that the interval misses. Default: ``0.05``.
        least_spread (float, optional): The least standard deviation to reckon with: what is measured in steps of one
            test sample can be the same by its coarseness alone. Default: ``0.0``.
    """
    values = np.asarray(differences, dtype=float)
    if not len(values):
        return Difference(float("nan"), float("nan"), float("nan"), 0)
    mean = float(values.mean())
    same = len(values) < 2 or np.ptp(values) <= 1e-12 * max(1.0, abs(mean))
    if len(values) < 2 or (same and not least_spread):
        return Difference(mean, float("nan"), float("nan"), len(values))
    spread = max(float(values.std(ddof=1)), least_spread)
    half = float(stats.t.isf(level / 2, len(values) - 1)) * spread / len(values) ** 0.5
    return Difference(mean, mean - half, mean + half, len(values))


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Gives a distribution-free 95 % interval of the median, of order statistics (the range, below six values)."""
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    lower = max(int(stats.binom.ppf(0.025, n, 0.5)) - 1, 0)
    return float(ordered[lower]), float(ordered[n - 1 - lower])


def ratio_of_means(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Gives the ratio of two means over the same items, and its 95 % interval by resampling items (bootstrap).

    Args:
        numerators (Sequence[float]): One for each item.
        denominators (Sequence[float]): As many.

    Returns:
        tuple[float, float, float]: The ratio, and the lower and the upper end of its interval.
    """
    pairs = np.stack([np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)])
    drawn = np.random.default_rng(0).integers(pairs.shape[1], size=(2000, pairs.shape[1]))
    above, below = pairs[:, drawn].mean(2)
    low, high = np.quantile(above / below, [0.025, 0.975])
    own = pairs.mean(1)
    return float(own[0] / own[1]), float(low), float(high)


def compare_at_cost(
    accuracies: Sequence[float],
    cost: tuple[float, float, float],
    curve_costs: Sequence[float],
    curves: Sequence[Sequence[float]],
    level: float = 0.05,
    least_spread: float = 0.0,
) -> Difference:
    """Gives a strategy against a curve of accuracy over cost, read at the strategy's own cost.

    For each seed the curve is interpolated between its points; the interval is the widest over the cost's own
    interval and over interpolation linear in the cost and in its logarithm. A strategy that costs more than the
    curve's last point is compared with that point.

    Args:
        accuracies (Sequence[float]): The strategy's, one for each seed.
        cost (tuple[float, float, float]): Its cost, and the lower and upper end of the cost's interval.
        curve_costs (Sequence[float]): Costs of the curve's points, shape (k,).
        curves (Sequence[Sequence[float]]): The curve's accuracies for the same seeds, shape (seeds, k).
        level (float, optional): See :func:`compare_paired`. Default: ``0.05``.
        least_spread (float, optional): See :func:`compare_paired`. Default: ``0.0``.

    Returns:
        Difference: No pairs if the strategy costs less than the curve's first point.
    """
    order = np.argsort(curve_costs)
    x = np.asarray(curve_costs, dtype=float)[order]
    if len(x) < 2 or cost[0] < x[0]:
        return compare_paired([])

    def compare(at: float, logarithmic: bool) -> Difference:
        points, place = (np.log(x), np.log(at)) if logarithmic else (x, at)
        read = [float(np.interp(place, points, np.asarray(curve, dtype=float)[order])) for curve in curves]
        differences = [own - other for own, other in zip(accuracies, read, strict=True)]
        return compare_paired(differences, level, least_spread)

    central = compare(cost[0], False)
    every = [compare(at, logarithmic) for at in cost for logarithmic in (False, True)]
    if any(np.isnan(each.low) for each in every):
        return Difference(central.mean, float("nan"), float("nan"), central.pairs)
    return Difference(central.mean, min(e.low for e in every), max(e.high for e in every), central.pairs)


def what_seeds_can_tell(seeds: int, differences: list[Difference], unit: str = "accuracy") -> list[str]:
    """Lines that say how small a difference the study can see, and how many comparisons it makes."""
    told = [each for each in differences if each.low == each.low]
    if seeds < 2:
        return ["One seed tells nothing about chance: no interval and no verdict can be given.", ""]
    quantile = stats.t.ppf(0.975, seeds - 1)
    text = (
        f"{seeds} seeds: a 95 % interval reaches {quantile:.1f} standard errors to each side (2.0 with many seeds)"
        f"{', so these runs can tell very little' if seeds < 5 else ''}."
    )
    if told:
        half = np.median([(each.high - each.low) / 2 for each in told])
        text += f" The median interval here is ±{half:.4f}: smaller differences in {unit} could not have shown."
    comparisons = len(told)
    text += (
        f" With {comparisons} comparisons about {0.05 * comparisons:.1f} would be called better or worse by chance "
        'alone. "Not distinguishable" does not mean equal.'
    )
    return [text, ""]
