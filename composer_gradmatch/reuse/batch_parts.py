"""Batches as a captured forward pass takes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from composer_gradmatch.batches import map_tensors

__all__ = ["NumbersOfSamples", "copied", "paths_of_numbers", "without"]


class NumbersOfSamples:
    """Stands for a list with one number for each sample (how many tokens it has), which a captured forward cannot read.

    In a batch, where the model's forward does not read it, it does not matter.
    """


def copied(batch: Any) -> Any:
    """A batch of copies, for functions that may change it in place."""
    return map_tensors(torch.clone, batch)


def paths_of_numbers(batch: Any, num_samples: int, path: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    """Where a batch has lists of one 0-d tensor for each sample."""
    if isinstance(batch, list | tuple):
        if len(batch) == num_samples and all(isinstance(item, torch.Tensor) and not item.dim() for item in batch):
            return {path}
        items: Any = enumerate(batch)
    else:
        items = batch.items() if isinstance(batch, Mapping) else ()
    return {found for key, item in items for found in paths_of_numbers(item, num_samples, (*path, key))}


def without(batch: Any, paths: set[tuple[Any, ...]], path: tuple[Any, ...] = ()) -> Any:
    """A batch with something else at some paths; itself where there are none."""
    if path in paths:
        return NumbersOfSamples()
    if not any(each[: len(path)] == path for each in paths):
        return batch
    if isinstance(batch, Mapping):
        changed: Any = copy.copy(batch)
        for key, item in batch.items():
            changed[key] = without(item, paths, (*path, key))
        return changed
    parts = [without(item, paths, (*path, i)) for i, item in enumerate(batch)]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
