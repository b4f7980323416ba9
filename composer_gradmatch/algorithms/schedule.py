"""When to select: Composer's schedule of selective backprop, by its clock or by one that counts batches."""

from __future__ import annotations

from typing import Literal

from composer.algorithms.selective_backprop import should_selective_backprop
from composer.core import State, TimeUnit

__all__ = ["Clock", "check_schedule", "elapsed_duration", "is_scheduled", "remark_on_epochs"]

#: ``"duration"`` counts in the unit of ``max_duration``, as Composer's own algorithm does; ``"batch"`` counts batches.
Clock = Literal["duration", "batch"]

#: How far, of training, selection may begin or end from where it should without a word.
_REMARKABLE = 0.05


def check_schedule(start: float, end: float, keep: float, interrupt: int, clock: str) -> None:
    """Checks when, and how much, an algorithm is to select.

    Args:
        start (float): Start of selection as a fraction of training.
        end (float): End of selection as a fraction of training.
        keep (float): The share of a minibatch to train on.
        interrupt (int): Every ``interrupt``-th batch is trained whole; 0 for none.
        clock (str): ``"duration"`` or ``"batch"``.

    Raises:
        ValueError: If a value is out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], the share of each minibatch to train on; got {keep}.")
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"start and end must be fractions of training with 0 <= start < end <= 1; got start={start}, end={end}."
        )
    if isinstance(interrupt, bool) or not isinstance(interrupt, int) or interrupt < 0:
        raise ValueError(
            f"interrupt must be an integer >= 0 (0: select from every batch; n: train every n-th batch whole); "
            f"got {interrupt!r}."
        )
    if clock not in ("duration", "batch"):
        raise ValueError(
            f"clock must be 'duration' (in the unit of max_duration) or 'batch' (counts batches), got {clock!r}."
        )


def elapsed_duration(state: State, clock: Clock) -> float:
    """Tells the share of training that is over.

    Args:
        state (State): The run's state.
        clock (str): What to count: see :data:`Clock`.

    Returns:
        float: In [0, 1).
    """
    elapsed = state.get_elapsed_duration()
    assert elapsed is not None, "max_duration is set while training"
    if clock == "batch" and _in_epochs(state) and state.dataloader_len is not None:
        assert state.max_duration is not None
        in_epoch = int(state.timestamp.batch_in_epoch) / int(state.dataloader_len)
        return (int(state.timestamp.epoch) + min(in_epoch, 1.0)) / state.max_duration.value
    return float(elapsed)


def is_scheduled(state: State, clock: Clock, start: float, end: float, interrupt: int) -> bool:
    """Tells whether to select from the batch that is about to be trained on.

    Args:
        state (State): The run's state.
        clock (str): See :data:`Clock`.
        start (float): Start of selection as a fraction of training.
        end (float): End of selection as a fraction of training.
        interrupt (int): Every ``interrupt``-th batch is trained whole; 0 for none.
    """
    return should_selective_backprop(
        current_duration=elapsed_duration(state, clock),
        batch_idx=int(state.timestamp.batch_in_epoch),
        start=start,
        end=end,
        interrupt=interrupt,
    )


def remark_on_epochs(state: State, clock: Clock, start: float, end: float) -> str | None:
    """Tells what becomes of ``start`` and ``end`` where whole epochs are counted, if that is far from what they say.

    Args:
        state (State): The run's state at FIT_START.
        clock (str): See :data:`Clock`.
        start (float): Start of selection as a fraction of training.
        end (float): End of selection as a fraction of training.

    Returns:
        str | None: A warning with the batches that will be selected from; None where there is nothing to say.
    """
    if not _in_epochs(state):
        return None
    assert state.max_duration is not None
    length = None if state.dataloader_len is None else int(state.dataloader_len)
    if clock == "batch":
        if length is not None:
            return None
        return "clock='batch' needs a data loader that knows its length; whole epochs are counted instead."
    epochs = state.max_duration.value
    selected = [epoch for epoch in range(epochs) if start <= epoch / epochs < end]
    remedy = "Pass clock='batch', which counts batches within an epoch, too, or give max_duration in batches."
    counted = f"max_duration={state.max_duration.to_timestring()} is counted in whole epochs, as Composer does"
    if not selected:
        return f"{counted}, and with start={start} and end={end} no batch at all will be selected from. {remedy}"
    first, last = selected[0] / epochs, (selected[-1] + 1) / epochs
    if max(abs(first - start), abs(last - end)) <= _REMARKABLE:
        return None
    of_batches = (
        "" if length is None else f", {len(selected) * length} of {epochs * length} batches (less those of interrupt)"
    )
    return (
        f"{counted}: with start={start} and end={end}, selection is from {first:.2f} to {last:.2f} of training"
        f"{of_batches}. {remedy}"
    )


def _in_epochs(state: State) -> bool:
    return state.max_duration is not None and state.max_duration.unit == TimeUnit.EPOCH
