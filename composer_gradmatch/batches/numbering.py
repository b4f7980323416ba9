"""The numbers of a run's samples: how many there are, and what each batch has."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from composer_gradmatch.batches.repeated_numbers import RepeatedNumbers
from composer_gradmatch.batches.sample_numbers import (
    NUMBER_KEY,
    NumberedSamples,
    has_numbers,
    parts_of,
    take_numbers,
)

__all__ = ["Numbering", "check_numbered", "numbered_samples"]


def numbered_samples(dataloader: Any) -> NumberedSamples | None:
    """Finds the data set of a loader that numbers its samples; None if there is none.

    Args:
        dataloader (Any): A run's.
    """
    dataset = getattr(dataloader, "dataset", None)
    while dataset is not None and not isinstance(dataset, NumberedSamples):
        dataset = getattr(dataset, "dataset", None)
    return dataset


def check_numbered(dataloader: Any) -> None:
    """Raises if a data set is made of several whose samples are numbered, each from 0 on.

    Args:
        dataloader (Any): A run's.

    Raises:
        ValueError: If it is.
    """
    dataset = getattr(dataloader, "dataset", None)
    if numbered_samples(dataloader) is None and any(isinstance(part, NumberedSamples) for part in parts_of(dataset)):
        raise ValueError(
            f"the data set ({type(dataset).__name__}) is made of several, and samples of a part have numbers, which "
            "are not those of the whole. Number the outermost one, that the loader is given: "
            "number_samples(ConcatDataset([a, b]))."
        )


class Numbering:
    """Takes the numbers out of a run's batches.

    Args:
        key (Any, optional): Where a batch has numbers of its own: a key of a mapping, or an index; None for those of
            :func:`.number_samples`. Default: ``None``.
    """

    def __init__(self, key: Any = None) -> None:
        self.key = key
        #: How many samples there are; None where that is not known.
        self.size: int | None = None
        self._dataset: Any = None
        self.has_changed = False
        self._repeated: RepeatedNumbers | None = None

    def find(self, dataloader: Any) -> None:
        """Finds out how many samples a data loader has.

        Args:
            dataloader (Any): The run's.

        Raises:
            ValueError: If its samples have no numbers.
        """
        found: Any = getattr(dataloader, "dataset", None) if self.key is not None else numbered_samples(dataloader)
        if self.key is None and found is None:
            raise ValueError(
                "refresh keeps what was seen of each sample, so it must know them again, but the training data have no "
                "numbers. Wrap them: numbered = composer_gradmatch.number_samples(dataset), and give the DataLoader "
                "numbered and collate_fn=numbered.collate_fn; or name numbers that batches already have by "
                "sample_id_key."
            )
        try:
            size = len(found)
        except TypeError:
            size = None
        # Wrapped once more, they are the same samples.
        samples = found.dataset if isinstance(found, NumberedSamples) else found
        self.has_changed = self._dataset is not None and (samples is not self._dataset or size != self.size)
        self._dataset, self.size = samples, size
        # Those of a wrapped data set are each sample's own.
        self._repeated = None if self.key is None or size is None else RepeatedNumbers(size, dataloader)

    def take(self, batch: Any) -> tuple[Any, torch.Tensor]:
        """Takes the numbers out of a batch, which is not changed itself.

        Args:
            batch (Any): A batch as the loader gives it.

        Returns:
            tuple[Any, torch.Tensor]: The batch without them, and the numbers, int64, shape (M,), on the CPU.

        Raises:
            ValueError: If there are none, or one is outside the data set.
        """
        if self.key is None and not has_numbers(batch):
            raise ValueError(
                f"A batch ({type(batch).__name__}) has no sample numbers at {NUMBER_KEY!r}, though number_samples has "
                "wrapped the data. The loader's collate_fn must be the wrapped data set's, and a DataSpec's "
                "batch_transforms must keep them: beside_numbers(transform)."
            )
        try:
            batch, numbers = take_numbers(batch) if self.key is None else _without(batch, self.key)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"A batch ({type(batch).__name__}) has no sample numbers at {self.key!r}. Check sample_id_key."
            ) from error
        numbers = _as_integers(numbers, self.key)
        if len(numbers) and (int(numbers.min()) < 0 or (self.size is not None and int(numbers.max()) >= self.size)):
            raise ValueError(
                f"A batch has sample numbers from {int(numbers.min())} to {int(numbers.max())}, but the data set has "
                f"{self.size} samples, 0 to {'?' if self.size is None else self.size - 1}. Check sample_id_key; of "
                "numbers that are counted from another one, wrap the data set by number_samples instead."
            )
        return batch, numbers

    def remark_on_repetitions(self, numbers: torch.Tensor, epoch: int) -> str | None:
        """Tells whether numbers of the batches' own are those of several samples: see :class:`.RepeatedNumbers`."""
        return None if self._repeated is None else self._repeated.see(numbers, epoch, self.key)


def _as_integers(numbers: Any, key: Any) -> torch.Tensor:
    """Makes a tensor of a batch's numbers, int64, shape (M,).

    Raises:
        ValueError: If they are none.
    """
    try:
        found = torch.as_tensor(numbers).detach().cpu()
    except (ValueError, TypeError, RuntimeError):
        found = None
    integers = found is not None and not found.is_floating_point() and found.dtype != torch.bool
    if found is not None and integers and found.dim() and found.numel() == len(found):
        return found.long().flatten()
    at = repr(NUMBER_KEY if key is None else key)
    what = f"a {type(numbers).__name__}" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
    raise ValueError(
        f"Sample numbers must be integers from 0 on, one for each sample; got {what} at {at}. Check sample_id_key, or "
        "leave it out and wrap the data set by number_samples (of names, say); of such data, the loader's collate_fn "
        "must be the wrapped data set's."
    )


def _without(batch: Any, key: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        bare: Any = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        return bare, bare.pop(key)
    items = list(batch)
    numbers = items.pop(key)
    return (type(batch)(items) if type(batch) in (tuple, list) else items), numbers
