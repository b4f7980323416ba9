"""What a study keeps of a training run."""

from __future__ import annotations

from typing import Any

from composer.core import State
from composer.loggers import Logger

from composer_gradmatch.train.run_summary import RunSummary

__all__ = ["RunRecorder"]


class RunRecorder(RunSummary):
    """A :class:`.RunSummary` that also keeps a metric's value after each evaluation, and the time of selection.

    Args:
        metric (str): Its logged name, e.g. ``"metrics/eval/MulticlassAccuracy"``.
    """

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric
        self.values: list[float] = []
        self.steps = 0
        self.selection_seconds = 0.0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Takes the metric and the selection's time."""
        super().log_metrics(metrics, step)
        for key, value in metrics.items():
            if key == self.metric:
                self.values.append(float(value))
            elif key.endswith("/selection_time"):
                self.selection_seconds += float(value)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Counts a step."""
        self.steps += 1
