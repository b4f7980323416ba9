"""Random selection: the baseline that gradient matching and loss-based selection have to beat."""

from __future__ import annotations

from typing import Any

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.algorithms.schedule import Clock
from composer_gradmatch.rules.table import RULES

__all__ = ["RandomBackprop"]


class RandomBackprop(RuleBackprop):
    """Backpropagates a uniformly random part of each minibatch, without a selection pass (§5 of the paper).

    It costs m/M of a step where the selecting strategies cost (M/3 + m)/M, and neither of them reliably beats it.

    Its arguments are those of :class:`.RuleBackprop` that have to do with when and how much to select.

    Raises:
        ValueError: If a value is out of range.

    Example:
        .. code-block:: python

            trainer = Trainer(..., algorithms=[RandomBackprop(start=0.0, end=1.0, keep=0.3, interrupt=0)])
    """

    log_name = RULES["random_backprop"].name

    def __init__(
        self,
        start: float = 0.5,
        end: float = 0.9,
        keep: float = 0.5,
        interrupt: int = 2,
        input_key: Any = 0,
        target_key: Any = 1,
        clock: Clock = "duration",
    ) -> None:
        super().__init__(
            RULES["random_backprop"],
            start,
            end,
            keep,
            interrupt=interrupt,
            input_key=input_key,
            target_key=target_key,
            clock=clock,
        )
