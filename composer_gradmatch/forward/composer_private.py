"""Every private interface of Composer that the package uses, and what is done where a version of Composer lacks one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from composer import Trainer
from composer.loggers import Logger, ProgressBarLogger
from composer.utils import dist
from torch import nn

__all__ = [
    "check_step",
    "generated_run_name",
    "ghost_batch_size",
    "show_beside_loss",
    "step_of",
    "unwrap_step",
    "wrap_step",
]


def _ghost_batch_norms() -> tuple[type[nn.Module], ...]:
    try:
        from composer.algorithms.ghost_batchnorm.ghost_batchnorm import (
            GhostBatchNorm1d,
            GhostBatchNorm2d,
            GhostBatchNorm3d,
        )
    except ImportError:
        return ()
    return GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d


#: The layers that Composer's ``GhostBatchNorm`` puts into a model. Without them no layer is taken for one.
_GHOST_BATCH_NORMS = _ghost_batch_norms()


def ghost_batch_size(model: nn.Module) -> int:
    """Gives the fewest samples that a model's ``GhostBatchNorm`` layers take at once; 1 if it has none.

    Args:
        model (nn.Module): The model.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, _GHOST_BATCH_NORMS)]
    return max((layer.ghost_batch_size for layer in layers), default=1)


#: The Trainer's method that makes a step.
_STEP = "_train_batch"


def check_step() -> None:
    """Checks that the Trainer makes each step in a method that :func:`wrap_step` can replace.

    Raises:
        ImportError: If this Composer has no such method; then two passes are made.
    """
    if not hasattr(Trainer, _STEP):
        raise ImportError(f"Composer's Trainer has no {_STEP}")


def step_of(trainer: Trainer) -> Callable[..., Any]:
    """Gives the method of a Trainer that makes a step."""
    return getattr(trainer, _STEP)


def wrap_step(trainer: Trainer, step: Callable[..., Any]) -> None:
    """Lets a Trainer make its steps by another function, until :func:`unwrap_step`."""
    step._wraps_step = True  # type: ignore[attr-defined]
    setattr(trainer, _STEP, step)


def unwrap_step(trainer: Trainer) -> None:
    """Gives a Trainer its own way back to make a step, where :func:`wrap_step` has replaced it."""
    if hasattr(vars(trainer).get(_STEP), "_wraps_step"):
        delattr(trainer, _STEP)


def generated_run_name() -> str:
    """Gives a name for a run that has none, the same on all ranks, as Composer would make it.

    Without Composer's own function, the time and eight random digits.
    """
    try:
        from composer.trainer.trainer import _generate_run_name
    except ImportError:
        name = f"{int(time.time())}-{random.Random().randrange(16**8):08x}"
        return dist.all_gather_object(name)[0]
    return _generate_run_name()


#: The columns that a bar's line has where it is written to a file: Composer's 120 end behind the loss.
_COLUMNS = 160


def show_beside_loss(logger: Logger, values: dict[str, str], at_once: bool) -> bool:
    """Shows values in Composer's progress bars, behind the loss, until others are shown by their names.

    ``ProgressBarLogger`` shows what it is told to log only if its name has ``loss/train`` in it; what it shows is a
    dict that it draws the bar by whenever it is told the loss. Without such a dict nothing is shown.

    Args:
        logger (Logger): The run's logger.
        values (dict[str, str]): Each by the name to show.
        at_once (bool): Whether to draw the bar; otherwise they are there with the next loss.

    Returns:
        bool: Whether there is a bar.
    """
    found = False
    for each in logger.destinations:
        if not isinstance(each, ProgressBarLogger):
            continue
        bar: Any = getattr(each, "train_pbar", None)
        shown = getattr(bar, "metrics", None)
        if not isinstance(shown, dict):
            continue
        for name, value in values.items():
            shown.pop(name, None)  # So that it comes behind the loss, in the first step, too.
            shown[name] = value
        line = getattr(bar, "pbar", None)
        if line is not None and not line.dynamic_ncols and line.ncols:
            line.ncols = max(line.ncols, _COLUMNS)
        if at_once:
            each.log_to_pbar({})
        found = True
    return found
