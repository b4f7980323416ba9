"""The metrics of a step: logged at once, or once the step is over where they are still on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.loggers import Logger

from composer_gradmatch.forward.composer_private import show_beside_loss
from composer_gradmatch.matching import effective_sample_size
from composer_gradmatch.rules.picks import Picks

__all__ = ["StepLog", "metrics_of"]

#: What the progress bar shows of a step: its name there → that of the metric.
_IN_BAR = {"keep": "fraction_kept", "step_length": "step_length"}
#: From what mean step length on a run is warned, and after how many steps.
_LONG, _ENOUGH_STEPS = 1.5, 20


def metrics_of(picks: Picks, num_samples: int, filled_up: bool) -> dict[str, float | torch.Tensor]:
    """Tells what to log of a step's picks: how many there are, how even their weights, and what the rule has to say.

    Args:
        picks (Picks): n picks of M samples.
        num_samples (int): M.
        filled_up (bool): Whether there are more of them than the rule picked.
    """
    n = len(picks.indices)
    metrics: dict[str, float | torch.Tensor] = {
        "fraction_kept": n / num_samples,
        "effective_sample_size": float(n),
        "largest_weight": 1.0,
    }
    if picks.weights is not None and not metrics.keys() <= picks.metrics.keys():
        metrics["effective_sample_size"] = effective_sample_size(picks.weights)
        # Relative to the mean of those that are not zero.
        metrics["largest_weight"] = picks.weights.max() / picks.weights[picks.weights != 0].mean()
    return {**metrics, **picks.metrics, **({"fraction_kept": n / num_samples} if filled_up else {})}


class StepLog:
    """Logs under a prefix, and counts the minibatches that a device could not match.

    Args:
        prefix (str): In front of each metric's name.
        warn (Callable): Warns once a run.
    """

    def __init__(self, prefix: str, warn: Callable[[str], None]) -> None:
        self.prefix, self.warn = prefix, warn
        self.reset()

    def reset(self) -> None:
        """Forgets what belongs to one Trainer."""
        self.not_matched = 0
        #: The sum of the steps' lengths, and their number.
        self._lengths, self._steps = 0.0, 0
        self._said_long = False
        #: What a progress bar shows, and whether that is of picks.
        self._in_bar: dict[str, str] = {}
        self.shows_picks = False
        self.drop()

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps."""
        return {"batches_not_matched": self.not_matched, "step_lengths": (self._lengths, self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.not_matched = state.get("batches_not_matched", 0)
        self._lengths, self._steps = state.get("step_lengths", (0.0, 0))

    def drop(self) -> None:
        """Forgets a step that was not ended."""
        self._late: tuple[dict[str, float | torch.Tensor], torch.Tensor, int] | None = None

    @property
    def is_late(self) -> bool:
        """Whether there is a step to log."""
        return self._late is not None

    def log(
        self, logger: Logger, metrics: dict[str, float | torch.Tensor], found: torch.Tensor | None, step: int
    ) -> None:
        """Logs a step, or keeps it until :meth:`log_late`: a value on a GPU makes the host wait for the work before it.

        Args:
            logger (Logger): The run's logger.
            metrics (dict): Numbers or scalar tensors.
            found (torch.Tensor, optional): Whether the picks were chosen at all; None where that is known.
            step (int): The step's number.
        """
        if found is None:
            self._write(logger, metrics)
        else:
            self._late = metrics, found, step

    def log_late(self, logger: Logger) -> None:
        """Logs a step that is over, as of its own number."""
        if self._late is None:
            return
        metrics, found, step = self._late
        if not found:
            self.not_matched += 1
            metrics = {key: metrics[key] for key in ("estimated_cost", "selection_time")}
            metrics["batches_not_matched"] = self.not_matched
            self.warn(
                "a minibatch has last-layer gradients that are not finite, or whose mean is zero; of it and others "
                "like it m samples are trained with weights one."
            )
        self._write(logger, metrics, step)

    def show_whole(self, logger: Logger) -> None:
        """Lets a progress bar that has shown picks show that a step is trained whole, and so as long as it should be.

        Args:
            logger (Logger): The run's logger.
        """
        self.shows_picks, self._in_bar = False, dict.fromkeys(self._in_bar, "1.00")
        show_beside_loss(logger, self._in_bar, at_once=False)

    def _write(self, logger: Logger, metrics: Mapping[str, float | torch.Tensor], step: int | None = None) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        logger.log_metrics({f"{self.prefix}/{key}": value for key, value in values.items()}, step)
        for name, key in _IN_BAR.items():
            if math.isfinite(value := values.get(key, math.nan)):
                self._in_bar[name] = f"{value:.2f}"
        # A step that is over has shown its loss already.
        self.shows_picks = show_beside_loss(logger, self._in_bar, at_once=step is not None)
        if math.isfinite(length := values.get("step_length", math.nan)):
            self._see_length(length)

    def _see_length(self, length: float) -> None:
        self._lengths, self._steps = self._lengths + length, self._steps + 1
        mean = self._lengths / self._steps
        if self._steps >= _ENOUGH_STEPS and mean > _LONG and not self._said_long:
            self._said_long = True
            self.warn(
                "steps on the picks are too long, which works as a higher learning rate: in the first "
                f"{self._steps} steps, the last layer's was {mean:.1f} times that of the whole minibatch on average. "
                "Where the rule's weights are at fault, GradMatch takes weights='matched'; else give the strategy a "
                "lower learning rate before comparing it with others."
            )
