"""Reading a run's batches by its keys, and learning what in them is not per sample."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Set
from typing import Any, TypeVar

import torch

from composer_gradmatch.batches.labels import class_labels
from composer_gradmatch.batches.minibatch import copy_batch, count_samples, take_samples
from composer_gradmatch.batches.nests import outline
from composer_gradmatch.batches.sample_leaves import names_by_length, sample_names

__all__ = ["BatchReader"]

T = TypeVar("T")
#: Of how many outlines of batches is kept what they have shown: lengths of sequences vary.
_OUTLINES = 256


class BatchReader:
    """Counts and takes the samples of a run's batches; those of one outline are looked into once.

    Args:
        input_key (Any, optional): Where a batch has its inputs: see :func:`.count_samples`. Default: ``0``.
        target_key (Any, optional): Where it has its targets. Default: ``1``.

    Attributes:
        not_per_sample (set[str]): The names of what was seen not to be per sample, though its length may be M.
    """

    def __init__(self, input_key: Any = 0, target_key: Any = 1) -> None:
        self.input_key, self.target_key = input_key, target_key
        #: A getter may look at the batch's numbers.
        self._by_outline = all(isinstance(key, int | str) for key in (input_key, target_key))
        self.reset()

    def reset(self) -> None:
        """Forgets the batches of another run."""
        self.not_per_sample: set[str] = set()
        self._found: dict[Hashable, Any] = {}

    def _once(self, what: Hashable, batch: Any, find: Callable[[], T]) -> T:
        """Gives what was found out about another batch of the same outline, or finds it out."""
        drawn = outline(batch) if self._by_outline else None
        if drawn is None:
            return find()
        key = what, drawn
        if key not in self._found:
            if len(self._found) >= _OUTLINES:
                self._found.clear()
            self._found[key] = find()
        return self._found[key]

    def count(self, batch: Any) -> int:
        """Counts the samples of a batch: see :func:`.count_samples`."""
        return self._once("count", batch, lambda: count_samples(batch, self.input_key, self.target_key))

    def labels(self, batch: Any, num_samples: int) -> torch.Tensor:
        """Reads the class of each of the M samples of a batch: see :func:`.class_labels`."""
        return class_labels(batch, self.target_key, num_samples)

    def learn(self, batch: Any, num_samples: int) -> None:
        """Takes note of what a batch of M samples shows not to be per sample."""
        self.leave_whole(self._once(("learn", num_samples), batch, lambda: names_by_length(batch, num_samples).keys()))

    def leave_whole(self, names: Set[str]) -> None:
        """Takes note of what is not per sample."""
        if not names <= self.not_per_sample:
            self.not_per_sample |= names
            self._found.clear()

    def names(self, batch: Any, num_samples: int) -> frozenset[str]:
        """Names what in a batch of M samples has a row for each."""
        return self._once(("names", num_samples), batch, lambda: sample_names(batch, num_samples, self.not_per_sample))

    def take(
        self, batch: Any, indices: torch.Tensor | slice, num_samples: int, names: frozenset[str] | None = None
    ) -> Any:
        """Takes some of the M samples of a batch, of whose :meth:`names` it may be told: see :func:`.take_samples`."""
        return take_samples(batch, indices, num_samples, self.not_per_sample, names)

    def copy_of(self, batch: Any, indices: torch.Tensor | slice, num_samples: int) -> Any:
        """Copies some of the M samples of a batch, for a forward pass or a loss that may change it as it likes."""
        whole = indices == slice(0, num_samples)
        return copy_batch(batch if whole else self.take(batch, indices, num_samples))
