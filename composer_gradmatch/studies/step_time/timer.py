"""Table 1 of the paper on a user's model: what a step of each strategy costs, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from composer.core import Event, State
from composer.loggers import Logger

from composer_gradmatch.spans import SpanRecorder
from composer_gradmatch.studies.interleave import Interleaved, Variant, fit_interleaved
from composer_gradmatch.studies.store import Run

__all__ = ["PARTS", "StepTimer", "add_ratios", "step_time"]

#: The parts of a step, in the order of a step; ``rest`` is the optimizer, metrics and Composer's own work.
PARTS = (
    "selection_forward",
    "output_gradients",
    "gram",
    "matching",
    "indexing",
    "selection_rest",
    "training_forward",
    "training_backward",
    "rest",
)


class StepTimer(Interleaved):
    """Times whole steps, round by round, each round a step of every variant in random order.

    The clock starts when the batch has left the data loader and stops at the end of the step. The first rounds
    warm up; the last ones, which wait for the device between them, time the parts of a step.

    Args:
        variants (Sequence[Variant]): To time; one of them the full batch.
        config (dict[str, Any]): The study's config.
        rounds (int): Timed rounds.
        warmup (int, optional): Rounds before them. Default: ``2``.
        part_rounds (int, optional): Rounds after them. Default: ``3``.
        measured (str, optional): What rows of timed rounds are called. Default: ``"step"``.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        config: dict[str, Any],
        rounds: int,
        warmup: int = 2,
        part_rounds: int = 3,
        measured: str = "step",
    ) -> None:
        super().__init__(variants, config)
        self.rounds, self.warmup, self.part_rounds, self.measured = rounds, warmup, part_rounds, measured
        self.rows: list[dict[str, Any]] = []
        self._order: list[Variant] = []
        self._round = -1
        self._rng = np.random.default_rng(0)
        self._marks: dict[str, float] = {}
        self._spans = SpanRecorder(self._synchronize)

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return (self.warmup + self.rounds + self.part_rounds) * len(self.variants)

    @staticmethod
    def _synchronize() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    @property
    def _times_parts(self) -> bool:
        return self._round >= self.warmup + self.rounds

    def _mark(self, name: str) -> None:
        if self._times_parts:
            self._synchronize()
            self._marks[name] = self._marks.get(name, 0.0) + time.perf_counter()

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Runs the current variant and looks at the clock: see :class:`.Algorithm`."""
        if event == Event.AFTER_DATALOADER:
            if not self._order:
                self._round += 1
                self._order = [self.variants[i] for i in self._rng.permutation(len(self.variants))]
            self.current = self._order.pop()
            self.cut(state, self.current.batch_size)
            self._marks = {}
            self._spans.seconds = {}
            self._synchronize()
            self._started = time.perf_counter()
            if self._times_parts:
                with self._spans.recording():
                    super().apply(event, state, logger)
            else:
                super().apply(event, state, logger)
            self._mark("selected")
            self._kept = self.count(state)
            if self.current.keep < 1 and self._kept == self.current.batch_size:
                raise RuntimeError(f"{self.current.strategy} trained a batch whole: there is no selection to time.")
            return
        if event == Event.BATCH_END:
            self._synchronize()
            self._finish(time.perf_counter())
        before = {Event.BEFORE_FORWARD: "forward", Event.BEFORE_BACKWARD: "backward"}
        if event in before:
            self._mark(before[event])
        super().apply(event, state, logger)
        if event == Event.AFTER_BACKWARD:
            self._mark("done")

    def _finish(self, now: float) -> None:
        if self._round < self.warmup:
            return
        variant, seconds = self.current, now - self._started
        row: dict[str, Any] = {
            "strategy": variant.strategy,
            "keep": variant.keep,
            "batch_size": variant.batch_size,
            "samples_kept": self._kept,
            "measured": "parts" if self._times_parts else self.measured,
            "round": self._round - self.warmup,
            "seconds": seconds,
            "estimated_cost": variant.estimated_cost,
        }
        if self._times_parts:
            spans, marks = self._spans.seconds, self._marks
            parts = {name: spans.get(name, 0.0) for name in PARTS[:5]}
            parts["selection_rest"] = marks["selected"] - self._started - sum(parts.values())
            # Each mark is a sum over microbatches, so differences are sums of their durations.
            parts["training_forward"] = marks["backward"] - marks["forward"]
            parts["training_backward"] = marks["done"] - marks["backward"]
            parts["rest"] = seconds - sum(parts.values())
            row |= {f"{name}_seconds": value for name, value in parts.items()}
        self.rows.append(row)


def step_time(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Times the run's variants: a row for each of them and each round, with the ratio to the full batch's."""
    variants = [Variant.build(run.config, *variant) for variant in run.options["variants"]]
    timer = StepTimer(variants, run.config, run.options["rounds"])
    config = {**run.config, "train_loader": {**run.config["train_loader"], "drop_last": True}}
    fit_interleaved(config, timer, max(v.batch_size for v in variants), timer.steps)
    add_ratios(timer.rows)
    return timer.rows, {}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds to each row the time for a sample of the minibatch relative to the full batch's in the same round."""
    full = {row["round"]: row["seconds"] / row["batch_size"] for row in rows if row["strategy"] == "full"}
    for row in rows:
        row["ratio"] = row["seconds"] / row["batch_size"] / full[row["round"]]
