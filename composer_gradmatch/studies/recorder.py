"""What a study keeps of a training run."""

from __future__ import annotations

import time
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger

from composer_gradmatch.train.run_summary import RunSummary

__all__ = ["RunRecorder"]


class RunRecorder(RunSummary):
    """A :class:`.RunSummary` that also keeps a metric's value after each evaluation, and the times until then.

    Args:
        metric (str): Its logged name, e.g. ``"metrics/eval/MulticlassAccuracy"``.

    Attributes:
        values (list[float]): The metric, by evaluation.
        seconds (list[float]): Spent until each of them on training: data, selection and steps, without evaluations.
    """

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric
        self.values: list[float] = []
        self.seconds: list[float] = []
        self.steps = 0
        self.selection_seconds = 0.0
        self._trained, self._since = 0.0, 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def eval_start(self, state: State, logger: Logger) -> None:
        """Stops the clock, once the device has done what it was given."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._trained += time.perf_counter() - self._since

    def eval_end(self, state: State, logger: Logger) -> None:
        """Lets the clock go on."""
        self._since = time.perf_counter()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Takes the metric and the selection's time."""
        super().log_metrics(metrics, step)
        for key, value in metrics.items():
            if key == self.metric:
                self.values.append(float(value))
                self.seconds.append(self._trained)
            elif key.endswith("/selection_time"):
                self.selection_seconds += float(value)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Counts a step."""
        self.steps += 1
