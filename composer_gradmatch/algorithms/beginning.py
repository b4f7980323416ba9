"""What comes before any selection from a batch: done once, for all of a Trainer's selecting algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer.core import State

from composer_gradmatch.batches.numbering import numbered_samples
from composer_gradmatch.batches.sample_numbers import without_numbers
from composer_gradmatch.candidates.stored import StoredLooks

__all__ = ["numbers_are_there", "take_numbers_for_all"]


def numbers_are_there(state: State) -> bool:
    """Tells whether the loader that is being read numbers its samples."""
    return numbered_samples(state.dataloader) is not None


def take_numbers_for_all(state: State, stores: Sequence[StoredLooks]) -> None:
    """Takes the samples' numbers out of the batch, and gives them to the stores.

    Args:
        state (State): On AFTER_DATALOADER.
        stores (Sequence[StoredLooks]): Of all of the Trainer's selecting algorithms.
    """
    taken: list[tuple[Any, Any]] = []
    for store in stores:
        key = store.numbering.key
        numbers = next((each for other, each in taken if other == key), None)
        if numbers is None:
            state.batch, numbers = store.numbering.take(state.batch)
            taken.append((key, numbers))
            remark = store.numbering.remark_on_repetitions(numbers, int(state.timestamp.epoch))
            if remark is not None:
                store.selection_pass.warn(remark)
        store.numbers = numbers
    if numbers_are_there(state):
        state.batch = without_numbers(state.batch)  # Which no store has asked for.
