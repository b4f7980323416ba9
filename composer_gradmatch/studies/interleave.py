"""Several strategies in one Trainer, one step each in turn: the very code that trains, on the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from composer_gradmatch.batches import count_samples, take_samples
from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.studies.strategies import selecting_entry, strategy_entry, strategy_named, with_strategy
from composer_gradmatch.train.builders import build_algorithms

__all__ = ["Interleaved", "Variant", "fit_interleaved"]


@dataclass(frozen=True)
class Variant:
    """A strategy at one keep.

    Attributes:
        strategy (str): Its study name.
        keep (float): The fraction kept; 1 for the full batch.
        batch_size (int): M.
        algorithm (Algorithm, optional): What selects; None for the full batch.
        estimated_cost (float): Of a step, in full steps: see :meth:`.Strategy.cost`.
    """

    strategy: str
    keep: float
    batch_size: int
    algorithm: Algorithm | None
    estimated_cost: float

    @classmethod
    def build(cls, config: dict[str, Any], strategy: str, keep: float, batch_size: int) -> Variant:
        """Builds the strategy's algorithm as ``config`` would have it, but selecting in every step."""
        entry = strategy_entry(config, strategy, keep)
        for arguments in entry.values():
            arguments.update(start=0.0, end=1.0, interrupt=0)
        cost = strategy_named(strategy).cost(keep)
        return cls(strategy, keep, batch_size, next(iter(build_algorithms(entry)), None), cost)


class Interleaved(Algorithm):
    """Hands each training step to one of several variants; the base of what measures them.

    Args:
        variants (Sequence[Variant]): To take turns.
        config (dict[str, Any]): The study's config, for the batch's keys.
    """

    selects_samples = True

    def __init__(self, variants: Sequence[Variant], config: dict[str, Any]) -> None:
        self.variants = list(variants)
        self.current = self.variants[0]
        arguments = (selecting_entry(config) or ("", {}))[1]
        self.keys = (arguments.get("input_key", 0), arguments.get("target_key", 1))

    def match(self, event: Event, state: State) -> bool:
        """Runs on every event: see :class:`.Algorithm`."""
        return True

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Hands the event to the current variant's algorithm."""
        if event == Event.FIT_START:
            for variant in self.variants:
                if variant.algorithm is not None:
                    for first in (Event.INIT, Event.FIT_START):
                        vars(variant.algorithm).update(ordered_first=True)  # As the algorithm pass does on each.
                        self._hand_on(variant, first, state, logger)
        else:
            self._hand_on(self.current, event, state, logger)

    @staticmethod
    def _hand_on(variant: Variant, event: Event, state: State, logger: Logger) -> None:
        if variant.algorithm is not None and variant.algorithm.match(event, state):
            variant.algorithm.apply(event, state, logger)

    def count(self, state: State) -> int:
        """Counts the samples in the batch."""
        return count_samples(state.batch, *self.keys)

    def cut(self, state: State, size: int) -> None:
        """Leaves the first ``size`` samples of the batch, on the model's device."""
        state.batch = state.device.batch_to_device(state.batch)
        num_samples = self.count(state)
        if size < num_samples:
            state.batch = take_samples(state.batch, torch.arange(size), num_samples)


def fit_interleaved(
    config: dict[str, Any], interleaved: Interleaved, batch_size: int, steps: int, loader: Any = None
) -> Trainer:
    """Trains with the weights held still (a learning rate of 0), each step by the variant whose turn it is.

    Args:
        config (dict[str, Any]): The study's config; its schedule, callbacks and evaluation are left out.
        interleaved (Interleaved): Takes the steps.
        batch_size (int): Samples a batch.
        steps (int): The most steps to make.
        loader (Any, optional): Gives the batches; None for the config's. Default: ``None``.

    Returns:
        Trainer: After training, closed.
    """
    dropped = (
        "scheduler",
        "scale_schedule_ratio",
        "eval_loader",
        "callbacks",
        "eval_interval",
        "train_subset_num_batches",
    )
    config = {key: value for key, value in with_strategy(config, "full", 1.0).items() if key not in dropped}
    config["optimizer"] = {**config["optimizer"], "lr": 0.0}
    config |= {"max_duration": f"{steps}ba", "global_train_batch_size": batch_size, "save_folder": None}
    trainer = builder_of(config).trainer(config)
    trainer.state.algorithms.append(interleaved)
    try:
        trainer.fit(train_dataloader=loader)
    finally:
        trainer.close()
    return trainer
