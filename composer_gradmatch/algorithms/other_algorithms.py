"""What Composer's other algorithms do to a model that the selecting ones have to know of."""

from __future__ import annotations

from typing import Any

from composer.algorithms import EMA
from composer.core import Event, State
from composer.loggers import Logger
from torch import nn

from composer_gradmatch.forward.composer_private import GHOST_BATCH_NORMS

__all__ = ["activate_training_weights", "ghost_batch_size", "smallest_microbatch"]


def activate_training_weights(state: State, logger: Logger) -> None:
    """Puts the weights that are being trained back into the model where ``EMA`` has left its average in it.

    To save a checkpoint ``EMA`` swaps its average in, and swaps it out on BATCH_START: after the selection.

    Args:
        state (State): The run's state, on AFTER_DATALOADER.
        logger (Logger): The run's logger.
    """
    for algorithm in state.algorithms:
        if isinstance(algorithm, EMA) and algorithm.match(Event.BATCH_START, state):
            algorithm.apply(Event.BATCH_START, state, logger)


def ghost_batch_size(model: nn.Module) -> int:
    """The fewest samples that a model's ``GhostBatchNorm`` layers take at once; 1 if it has none.

    Args:
        model (nn.Module): The model.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GHOST_BATCH_NORMS)]
    return max((layer.ghost_batch_size for layer in layers), default=1)


def smallest_microbatch(num_samples: int, microbatch_size: float | None) -> int:
    """The size of the smallest microbatch that Composer splits samples into.

    Args:
        num_samples (int): The samples of a batch.
        microbatch_size (float, optional): The run's ``device_train_microbatch_size``.
    """
    if microbatch_size is None or microbatch_size >= num_samples:
        return num_samples
    size = max(1, int(microbatch_size))
    return num_samples % size or size
