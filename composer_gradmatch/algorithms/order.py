"""Which other algorithms may stand where in the Trainer's list, beside one that selects."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from composer.algorithms import SelectiveBackprop
from composer.core import Algorithm, Event, State

__all__ = ["check_order", "check_order_of_losses", "check_unweighted_losses"]


def _earlier_after_events(selecting: Algorithm, state: State) -> Sequence[Algorithm]:
    """Tells what runs before an algorithm on AFTER_ events: what stands behind it, since Composer reverses the list."""
    positions = [i for i, algorithm in enumerate(state.algorithms) if algorithm is selecting]
    if not positions:
        raise ValueError(
            f"This {type(selecting).__name__} is not among the Trainer's algorithms. Pass it as "
            "Trainer(algorithms=[...]), which calls its events in order."
        )
    return state.algorithms[positions[0] + 1 :]


def check_order(selecting: Algorithm, state: State) -> None:
    """Warns at FIT_START of algorithms that change the batch before the selecting one sees it.

    Args:
        selecting (Algorithm): One that selects.
        state (State): The run's state.

    Raises:
        ValueError: If it is not among the Trainer's algorithms.
    """
    earlier = [
        type(other).__name__
        for other in _earlier_after_events(selecting, state)
        # Another that selects does so at other times, and leaves the batch as it is at this one's.
        if not getattr(other, "selects_samples", False)
        and not isinstance(other, SelectiveBackprop)
        and other.match(Event.AFTER_DATALOADER, state)
    ]
    if earlier:
        warnings.warn(
            f"{', '.join(earlier)} will change each minibatch on AFTER_DATALOADER before {type(selecting).__name__} "
            "selects from it. To select first, add to the Trainer:\n"
            "    algorithm_passes=[composer_gradmatch.select_first]",
            stacklevel=2,
        )


def check_order_of_losses(selecting: Algorithm, state: State, kind: type[Algorithm]) -> None:
    """Raises if an algorithm would undo its change of the loss before the samples are weighted.

    Args:
        selecting (Algorithm): One that selects, with weights.
        state (State): The run's state.
        kind (type): Which algorithms to look at.

    Raises:
        ValueError: If one would.
    """
    owner = type(selecting).__name__
    for other in _earlier_after_events(selecting, state):
        if not isinstance(other, kind):
            continue
        if other.match(Event.BEFORE_LOSS, state) and other.match(Event.AFTER_LOSS, state):
            raise ValueError(
                f"{type(other).__name__} changes the batch for the loss and puts it back on AFTER_LOSS, before "
                f"{owner} weighs the samples' losses. List {owner} after it, or add to the Trainer: "
                "algorithm_passes=[composer_gradmatch.select_first]."
            )


def check_unweighted_losses(selecting: Algorithm, state: State) -> None:
    """Raises if an algorithm adds a loss of its own once the samples are weighted.

    Args:
        selecting (Algorithm): One that selects, with weights.
        state (State): The run's state.

    Raises:
        ValueError: If one does.
    """
    for other in state.algorithms:
        if getattr(other, "interpolate_loss", False):
            raise ValueError(
                f"{type(other).__name__}(interpolate_loss=True) adds an unweighted loss after "
                f"{type(selecting).__name__} has weighted its samples. Use interpolate_loss=False, which mixes the "
                "targets instead."
            )
