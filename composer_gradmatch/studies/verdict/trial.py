"""A run that the verdict may ask for, and what came of it; whatever makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["FULL", "Cell", "Outcome", "Source", "Trial"]

#: A strategy at one keep.
Cell = tuple[str, float]
#: The full batch's.
FULL: Cell = ("full", 1.0)


@dataclass(frozen=True)
class Trial:
    """What to train, and what to evaluate on.

    Attributes:
        cell (Cell): The strategy, and the fraction that it keeps.
        rate (float): The learning rate.
        seed (int): Of the run.
        share (float, optional): Of the config's duration, schedule and all. Default: ``1.0``.
        data (str, optional): ``"test"``: trained on the training set; or ``"validation"``: trained on it without the
            validation part, which is evaluated on. Default: ``"test"``.
    """

    cell: Cell
    rate: float
    seed: int
    share: float = 1.0
    data: Literal["test", "validation"] = "test"


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        accuracies (tuple[float, ...]): After each evaluation.
        training_seconds (tuple[float, ...]): Spent on training until each evaluation.
        seconds (float): All that the run took, which is what counts against the budget.
        error (str, optional): What it failed of; empty if it did not. Default: ``""``.
    """

    accuracies: tuple[float, ...]
    training_seconds: tuple[float, ...]
    seconds: float
    error: str = ""

    @property
    def last(self) -> float:
        """The accuracy at the end."""
        return self.accuracies[-1]

    @property
    def cost(self) -> float:
        """The time of training, in seconds."""
        return self.training_seconds[-1]


#: Gives what came of a trial, making it if need be: the only part that trains.
Source = Callable[[Trial], Outcome]
