"""Reading a run's batches by its keys, and learning what in them is not per sample."""

from __future__ import annotations

from typing import Any

import torch

from composer_gradmatch.batches.labels import class_labels
from composer_gradmatch.batches.minibatch import copy_batch, count_samples, take_samples
from composer_gradmatch.batches.sample_leaves import names_by_length, sample_names

__all__ = ["BatchReader"]


class BatchReader:
    """Counts and takes the samples of a run's batches.

    Args:
        input_key (Any, optional): Where a batch has its inputs: see :func:`.count_samples`. Default: ``0``.
        target_key (Any, optional): Where it has its targets. Default: ``1``.

    Attributes:
        not_per_sample (set[str]): The names of what was seen not to be per sample, though its length may be M.
    """

    def __init__(self, input_key: Any = 0, target_key: Any = 1) -> None:
        self.input_key, self.target_key = input_key, target_key
        self.not_per_sample: set[str] = set()

    def reset(self) -> None:
        """Forgets the batches of another run."""
        self.not_per_sample = set()

    def count(self, batch: Any) -> int:
        """Counts the samples of a batch: see :func:`.count_samples`."""
        return count_samples(batch, self.input_key, self.target_key)

    def labels(self, batch: Any, num_samples: int) -> torch.Tensor:
        """Reads the class of each of the M samples of a batch: see :func:`.class_labels`."""
        return class_labels(batch, self.target_key, num_samples)

    def learn(self, batch: Any, num_samples: int) -> None:
        """Takes note of what a batch of M samples shows not to be per sample."""
        self.not_per_sample |= names_by_length(batch, num_samples).keys()

    def names(self, batch: Any, num_samples: int) -> frozenset[str]:
        """Names what in a batch of M samples has a row for each."""
        return sample_names(batch, num_samples, self.not_per_sample)

    def take(
        self, batch: Any, indices: torch.Tensor | slice, num_samples: int, names: frozenset[str] | None = None
    ) -> Any:
        """Takes some of the M samples of a batch, of whose :meth:`names` it may be told: see :func:`.take_samples`."""
        return take_samples(batch, indices, num_samples, self.not_per_sample, names)

    def copy_of(self, batch: Any, indices: torch.Tensor | slice, num_samples: int) -> Any:
        """Copies some of the M samples of a batch, for a forward pass or a loss that may change it as it likes."""
        whole = indices == slice(0, num_samples)
        return copy_batch(batch if whole else self.take(batch, indices, num_samples))
