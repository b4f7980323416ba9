"""Random selection: the baseline that gradient matching and loss-based selection have to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.algorithms.schedule import Clock
from composer_gradmatch.forward.losses import LossFn
from composer_gradmatch.rules.table import RULES

__all__ = ["RandomBackprop"]


class RandomBackprop(RuleBackprop):
    """Backpropagates a uniformly random part of each minibatch, without a selection pass (§5 of the paper).

    It costs m/M of a step where the selecting strategies cost (M/3 + m)/M, and neither of them reliably beats it.

    Its arguments are those of :class:`.RuleBackprop` that have to do with when and how much to select. With ``refresh``
    and ``suspects`` it looks for samples whose labels look wrong, and draws among the others; ``keep=1`` then trains on
    all others.

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
        *,
        loss_fn: LossFn | None = None,
        refresh: str | None = None,
        sample_id_key: Any = None,
        store_device: Literal["cpu", "gpu"] = "cpu",
        store_limit: float = 2.0,
        suspects: bool | Mapping[str, Any] = False,
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
            loss_fn=loss_fn,
            refresh=refresh,
            sample_id_key=sample_id_key,
            store_device=store_device,
            store_limit=store_limit,
            suspects=suspects,
        )
