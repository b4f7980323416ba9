"""What Composer's other algorithms do to a model that the selecting ones have to know of."""

from __future__ import annotations

from composer.algorithms import EMA
from composer.core import Event, State
from composer.loggers import Logger

__all__ = ["activate_training_weights"]


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
