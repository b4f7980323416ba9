"""A candidate beside the full batch, and beside random at equal cost, at one look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from composer_gradmatch.studies.statistics import Difference, compare_at_cost, compare_paired
from composer_gradmatch.studies.verdict.bounds import nominal_level
from composer_gradmatch.studies.verdict.question import Question
from composer_gradmatch.studies.verdict.trial import FULL, Cell, Outcome

__all__ = ["Compared", "Share", "compare", "share_of_full"]

#: Outcomes of cells, each by seed.
Results = Mapping[Cell, Sequence[Outcome]]


@dataclass(frozen=True)
class Share:
    """The time of training as a share of the full batch's: geometric mean over pairs, with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Compared:
    """What a look shows of a candidate.

    Attributes:
        seeds (int): n.
        cost (Share): Of the full batch's.
        minus_full (Difference): Paired, with the look's interval.
        spread (float): Standard deviation of the paired differences.
        minus_random (Difference, optional): To random's curve at the candidate's own cost; None for random itself.
        against_full (str): ``"better"``, ``"non-inferior"`` (within the margin), ``"worse"`` (by more than it) or
            ``"undecided"``.
        against_random (str): ``"better"``, ``"worse"``, ``"no different"`` (within the margin either way),
            ``"undecided"``, or ``""`` where there is nothing to compare with.
    """

    seeds: int
    cost: Share
    minus_full: Difference
    spread: float
    minus_random: Difference | None
    against_full: str
    against_random: str


def share_of_full(own: Sequence[Outcome], full: Sequence[Outcome]) -> Share:
    """Gives what runs cost, as a share of the full batch's of the same seeds."""
    ratios = np.log([mine.cost / other.cost for mine, other in zip(own, full, strict=True)])
    mean = float(ratios.mean())
    half = 0.0
    if len(ratios) > 1:
        half = float(stats.t.isf(0.025, len(ratios) - 1) * ratios.std(ddof=1) / len(ratios) ** 0.5)
    return Share(*(float(np.exp(each)) for each in (mean, mean - half, mean + half)))


def compare(results: Results, cell: Cell, seeds: int, alpha: float, question: Question) -> Compared:
    """Compares a candidate at a look.

    Args:
        results (Results): Of the candidate, the full batch and, where there are any, random's cells; those with fewer
            seeds are left out of random's curve.
        cell (Cell): The candidate.
        seeds (int): n.
        alpha (float): The error over all looks.
        question (Question): The margin, and what accuracies are counted on.
    """
    level, least = nominal_level(alpha, seeds), question.least_spread
    own, full = results[cell][:seeds], results[FULL][:seeds]
    differences = [mine.last - other.last for mine, other in zip(own, full, strict=True)]
    cost = share_of_full(own, full)
    minus_full = compare_paired(differences, level, least)
    minus_random = None
    if cell[0] != "random":
        points = [point for point in (*question.randoms, FULL) if len(results.get(point, ())) >= seeds]
        shares = [share_of_full(results[point][:seeds], full).mean for point in points]
        curves = [[results[point][seed].last for point in points] for seed in range(seeds)]
        accuracies = [outcome.last for outcome in own]
        minus_random = compare_at_cost(accuracies, (cost.mean, cost.low, cost.high), shares, curves, level, least)
    spread = max(float(np.std(differences, ddof=1)), least) if seeds > 1 else float("nan")
    return Compared(
        seeds,
        cost,
        minus_full,
        spread,
        minus_random,
        _against_full(minus_full, question.margin),
        _against_random(minus_random, question.margin),
    )


def _against_full(difference: Difference, margin: float) -> str:
    if difference.low > -margin:
        return "better" if difference.low > 0 else "non-inferior"
    return "worse" if difference.high < -margin else "undecided"


def _against_random(difference: Difference | None, margin: float) -> str:
    if difference is None or difference.pairs == 0:
        return ""
    if difference.low > 0 or difference.high < 0:
        return "better" if difference.low > 0 else "worse"
    return "no different" if difference.low > -margin and difference.high < margin else "undecided"
