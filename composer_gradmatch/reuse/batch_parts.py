"""Batches as a captured forward pass takes them."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from composer_gradmatch.batches.nests import is_sequence, map_nest, named_leaves
from composer_gradmatch.batches.sample_leaves import sample_names

__all__ = ["ListOfSamples", "lists_of_samples", "without_lists"]


class ListOfSamples:
    """Stands for a list with something for each sample, which a captured forward cannot read.

    In a batch, where the model's forward does not read it, it does not matter.
    """


def lists_of_samples(batch: Any, num_samples: int) -> frozenset[str]:
    """Names a batch's lists that have something for each sample.

    Args:
        batch (Any): A batch.
        num_samples (int): M.
    """
    names = sample_names(batch, num_samples)
    return frozenset(name for name, leaf in named_leaves(batch, names) if name in names and is_sequence(leaf))


def without_lists(batch: Any, lists: Set[str]) -> Any:
    """Puts something else in the place of a batch's lists of samples.

    Args:
        batch (Any): A batch.
        lists (Set[str]): Their names, from :func:`lists_of_samples`.

    Returns:
        Any: A batch in new containers; the same one where there are no such lists.
    """
    if not lists:
        return batch
    return map_nest(lambda name, leaf: ListOfSamples() if name in lists else leaf, batch, lists)
