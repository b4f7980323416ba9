"""What comes before any selection from a batch: done once, for all of a Trainer's selecting algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer.core import State

from composer_gradmatch.batches.numbering import check_numbered, numbered_samples
from composer_gradmatch.batches.sample_numbers import without_numbers
from composer_gradmatch.candidates.stored import StoredLooks

__all__ = ["check_numbers", "numbers_are_there", "others_beside", "take_numbers_for_all"]


def others_beside(algorithm: Any, state: State) -> list[Any]:
    """Lists a Trainer's selecting algorithms of ours but one.

    Args:
        algorithm (SubsetBackprop): The one.
        state (State): The Trainer's.
    """
    return [each for each in state.algorithms if hasattr(each, "selector") and each is not algorithm]


def _stores_of(algorithms: Sequence[Any]) -> list[StoredLooks]:
    """Lists the stores of those selecting algorithms that have one."""
    return [each.selector.store for each in algorithms if each.selector.store is not None]


def check_numbers(state: State, algorithms: Sequence[Any]) -> None:
    """Raises at FIT_START if samples' numbers cannot be taken out of the batches.

    Args:
        state (State): At FIT_START.
        algorithms (Sequence[SubsetBackprop]): All of the Trainer's.

    Raises:
        ValueError: If parts of the data set are numbered, or two algorithms read different items of a batch as numbers,
            of which the first to be taken out would move the other.
    """
    check_numbered(state.dataloader)
    keys = {store.numbering.key for store in _stores_of(algorithms)}
    if len(keys) > 1 and any(isinstance(key, int) for key in keys):
        raise ValueError(
            f"the selecting algorithms' sample_id_keys are {', '.join(sorted(map(repr, keys)))}, which name different "
            "items of a batch by their place. Give all of them the same."
        )


def numbers_are_there(state: State) -> bool:
    """Tells whether the loader that is being read numbers its samples."""
    return numbered_samples(state.dataloader) is not None


def take_numbers_for_all(state: State, algorithms: Sequence[Any]) -> None:
    """Takes the samples' numbers out of the batch, and gives them to the algorithms' stores.

    Args:
        state (State): On AFTER_DATALOADER.
        algorithms (Sequence[SubsetBackprop]): All of the Trainer's.
    """
    taken: list[tuple[Any, Any]] = []
    for store in _stores_of(algorithms):
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
