"""Time to accuracy: what a run costs until it is as accurate as asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Reached", "first_reached", "time_to_accuracy"]


@dataclass(frozen=True)
class Reached:
    """When runs first reached an accuracy.

    Attributes:
        reached (int): How many runs did.
        runs (int): Of how many.
        cost (float, optional): The median over all runs, one that did not counting as later than any; None if half of
            them or fewer did.
        low (float, optional): The earliest; None if none did.
        high (float, optional): The latest; None if not all did.
    """

    reached: int
    runs: int
    cost: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.cost is None:
            return f"reached by {self.reached} of {self.runs} runs"
        most = "never" if self.high is None else f"{self.high:.2f}"
        return f"{self.cost:.2f} ({self.low:.2f} to {most})"


def first_reached(accuracies: Sequence[float], costs: Sequence[float], target: float) -> float | None:
    """Gives the cost at the first evaluation that is at least at the target; None if there is none.

    Args:
        accuracies (Sequence[float]): Of one run, by evaluation.
        costs (Sequence[float]): What was spent until then, in any unit.
        target (float): The accuracy to reach.
    """
    return next((cost for accuracy, cost in zip(accuracies, costs, strict=True) if accuracy >= target), None)


def time_to_accuracy(curves: Sequence[tuple[Sequence[float], Sequence[float]]], target: float) -> Reached:
    """Gives when several runs, each as accuracies and costs by evaluation, first reached a target.

    Args:
        curves (Sequence[tuple]): See :func:`first_reached`; at least one.
        target (float): The accuracy to reach.
    """
    found = [first_reached(accuracies, costs, target) for accuracies, costs in curves]
    costs = [cost for cost in found if cost is not None]
    middle = median(float("inf") if cost is None else cost for cost in found)
    every = len(costs) == len(found)
    return Reached(
        len(costs),
        len(found),
        middle if middle < float("inf") else None,
        min(costs, default=None),
        max(costs) if every else None,
    )
