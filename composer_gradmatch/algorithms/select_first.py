"""The algorithm pass that lets selection truly come first."""

from __future__ import annotations

from collections.abc import Sequence

from composer.algorithms import SelectiveBackprop
from composer.core import Algorithm, Event

from composer_gradmatch.algorithms.subset_backprop import SubsetBackprop

__all__ = ["select_first"]


def select_first(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
    """Runs the selecting algorithms first on AFTER_DATALOADER, before others change the minibatch.

    Composer sorts its ``SelectiveBackprop`` to the front and then reverses the order for AFTER_ events, so that
    it runs last. Pass this one to the Trainer, where it comes after Composer's own passes::

        Trainer(..., algorithm_passes=[select_first])

    On BEFORE_FORWARD and AFTER_LOSS, too, the selecting algorithms run first: they look up the weights of the
    samples before a ``MixUp`` changes them, and weigh the loss before a ``LabelSmoothing`` puts the labels back
    that the loss was computed without. On BEFORE_LOSS they run last, and see the batch that the loss is given.

    Args:
        algorithms (Sequence[Algorithm]): The algorithms that run on the event, in order.
        event (Event): The event.

    Returns:
        Sequence[Algorithm]: The same algorithms, in the order to run them in.
    """
    if event in (Event.INIT, Event.FIT_START):
        for algorithm in algorithms:
            if isinstance(algorithm, SubsetBackprop):
                algorithm.ordered_first = True
    if event not in (Event.AFTER_DATALOADER, Event.BEFORE_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS):
        return algorithms
    return sorted(algorithms, key=_place, reverse=event == Event.BEFORE_LOSS)


def _place(algorithm: Algorithm) -> int:
    """Gives an algorithm's place: ours, which see the first batch whole, Composer's own that selects, and others."""
    if getattr(algorithm, "selects_samples", False):
        return 0
    return 1 if isinstance(algorithm, SelectiveBackprop) else 2
