"""Two selecting algorithms in one Trainer: their intervals must not overlap."""

from __future__ import annotations

import math
from typing import Any

from composer.algorithms import SelectiveBackprop
from composer.core import Algorithm, Event, State, TimeUnit

__all__ = ["check_apart", "selects_now"]


def selects_now(algorithm: Any, state: State) -> bool:
    """Tells whether an algorithm selects from the batch that has been begun."""
    if isinstance(algorithm, SelectiveBackprop):
        return _selects(algorithm) and algorithm.match(Event.AFTER_DATALOADER, state)
    return bool(getattr(algorithm, "_scheduled", False))


def _selects(algorithm: Algorithm) -> bool:
    if isinstance(algorithm, SelectiveBackprop):
        return algorithm.keep < 1
    return bool(getattr(algorithm, "selects_samples", False) and getattr(algorithm, "selects", True))


def check_apart(selecting: Any, state: State) -> None:
    """Raises if another algorithm would select from the same minibatches.

    Args:
        selecting (SubsetBackprop): One that selects.
        state (State): At INIT, or at FIT_START, when what is seen of clocks that differ is known, too.

    Raises:
        ValueError: If one would.
    """
    for other in state.algorithms:
        if other is selecting or not _selects(selecting) or not _selects(other) or not hasattr(other, "start"):
            continue
        theirs: Any = other
        if _overlap(state, _interval(selecting), _interval(theirs)):
            clocks = _interval(selecting)[0], _interval(theirs)[0]
            alike = "" if clocks[0] == clocks[1] else f", counted by the clocks {clocks[0]!r} and {clocks[1]!r}"
            raise ValueError(
                f"{type(selecting).__name__} (from {selecting.start} to {selecting.end} of training) and "
                f"{type(theirs).__name__} (from {theirs.start} to {theirs.end}{alike}) would both select from the same "
                "minibatches. Keep one of them, or give them intervals that do not overlap"
                f"{' and the same clock' if alike else ''}."
            )


def _interval(algorithm: Any) -> tuple[str, float, float]:
    return getattr(algorithm, "clock", "duration"), algorithm.start, algorithm.end


def _overlap(state: State, one: tuple[str, float, float], other: tuple[str, float, float]) -> bool:
    length, duration = state.dataloader_len, state.max_duration
    in_epochs = duration is not None and duration.unit == TimeUnit.EPOCH
    if one[0] == other[0] or not in_epochs or length is None or duration is None:
        return one[1] < other[2] and other[1] < one[2]
    epochs = int(duration.value)
    for epoch in range(epochs):
        parts = [_batches(*each, epoch, epochs, int(length)) for each in (one, other)]
        if max(part.start for part in parts) < min(part.stop for part in parts):
            return True
    return False


def _batches(clock: str, start: float, end: float, epoch: int, epochs: int, length: int) -> range:
    """Gives the batches of an epoch that are within an interval, by a clock of whole epochs or of batches."""
    if clock == "duration":
        return range(length if start <= epoch / epochs < end else 0)
    first, last = (min(max(math.ceil((edge * epochs - epoch) * length), 0), length) for edge in (start, end))
    return range(first, last)
