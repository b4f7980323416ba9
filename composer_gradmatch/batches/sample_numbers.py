"""The number of each sample in its data set: put into batches by a wrapped data set, and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

__all__ = ["NUMBER_KEY", "NumberedSamples", "Numbering", "number_samples"]

#: Where a numbered batch that is a mapping has the numbers.
NUMBER_KEY = "sample_number"


class Numbered(NamedTuple):
    """A sample, or a batch, that is neither a mapping nor a plain tuple or list, beside its number."""

    item: Any
    number: Any


def _is_plain(item: Any) -> bool:
    return type(item) in (tuple, list)


def _with_number(item: Any, number: Any) -> Any:
    if isinstance(item, Mapping):
        if NUMBER_KEY in item:
            raise ValueError(f"a sample already has a key {NUMBER_KEY!r}, which its number is to be put under.")
        numbered: Any = copy.copy(item) if isinstance(item, MutableMapping) else dict(item)
        numbered[NUMBER_KEY] = number
        return numbered
    if _is_plain(item):
        return type(item)([*item, number])
    return Numbered(item, number)


def _without_number(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        bare: Any = copy.copy(item) if isinstance(item, MutableMapping) else dict(item)
        return bare, bare.pop(NUMBER_KEY)
    if isinstance(item, Numbered):
        return item.item, item.number
    return type(item)(item[:-1]), item[-1]


class NumberedSamples(Dataset):
    """A data set whose samples carry their number: see :func:`number_samples`.

    All other attributes are those of the data set that it wraps.

    Attributes:
        dataset (Dataset): The data set that it wraps.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None = None) -> None:
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise TypeError(
                f"number_samples needs a map-style data set, whose samples are found by their number; got "
                f"{type(dataset).__name__}. If its samples have numbers of their own, name them by sample_id_key."
            )
        self.dataset = dataset
        self._collate = default_collate if collate_fn is None else collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        number = int(index)
        return _with_number(self.dataset[index], number + len(self) if number < 0 else number)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return [
                _with_number(item, int(i)) for i, item in zip(indices, self.dataset.__getitems__(indices), strict=True)
            ]
        return [self[index] for index in indices]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("dataset", "_collate"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def collate_fn(self, items: list[Any]) -> Any:
        """Collates numbered samples by the data loader's own function, which does not see the numbers."""
        bare, numbers = zip(*map(_without_number, items), strict=True)
        batch = self._collate(list(bare))
        # A batch of another kind than its samples is marked by its kind as theirs are.
        return _with_number(batch, torch.tensor(numbers))


def number_samples(dataset: Any, collate_fn: Callable[[list[Any]], Any] | None = None) -> NumberedSamples:
    """Wraps a map-style data set, so that strategies with ``refresh`` know each sample again.

    The numbers are taken out of each batch before model, loss or other algorithms see it. Give the loader the wrapped
    data set's ``collate_fn``, too::

        numbered = number_samples(dataset)  # number_samples(dataset, collate_fn=mine) for a collate function of yours
        DataLoader(numbered, batch_size=128, collate_fn=numbered.collate_fn, sampler=dist.get_sampler(numbered))

    Args:
        dataset (Dataset): Map-style: it has ``__getitem__`` and ``__len__``.
        collate_fn (Callable, optional): Makes a batch of a list of its samples; None for torch's.
            Default: ``None``.

    Returns:
        NumberedSamples: The same samples, with their numbers.

    Raises:
        TypeError: If it is an iterable data set, or no data set.
    """
    return NumberedSamples(dataset, collate_fn)


class Numbering:
    """Takes the numbers out of a run's batches.

    Args:
        key (Any, optional): Where a batch has numbers of its own: a key of a mapping, or an index; None for those of
            :func:`number_samples`. Default: ``None``.
    """

    def __init__(self, key: Any = None) -> None:
        self.key = key
        #: How many samples there are; None where that is not known.
        self.size: int | None = None
        self._dataset: Any = None
        self.has_changed = False

    def find(self, dataloader: Any) -> None:
        """Finds out how many samples a data loader has.

        Args:
            dataloader (Any): The run's.

        Raises:
            ValueError: If its samples have no numbers.
        """
        dataset = getattr(dataloader, "dataset", None)
        numbered = dataset
        while self.key is None and numbered is not None and not isinstance(numbered, NumberedSamples):
            numbered = getattr(numbered, "dataset", None)
        if self.key is None and numbered is None:
            raise ValueError(
                "refresh keeps what was seen of each sample, so it must know them again, but the training data have no "
                "numbers. Wrap them: numbered = composer_gradmatch.number_samples(dataset), and give the DataLoader "
                "numbered and collate_fn=numbered.collate_fn; or name numbers that batches already have by "
                "sample_id_key."
            )
        found = numbered if self.key is None else dataset
        try:
            size = len(found)
        except TypeError:
            size = None
        self.has_changed = self._dataset is not None and (found is not self._dataset or size != self.size)
        self._dataset, self.size = found, size

    def take(self, batch: Any) -> tuple[Any, torch.Tensor]:
        """Takes the numbers out of a batch, which is not changed itself.

        Args:
            batch (Any): A batch as the loader gives it.

        Returns:
            tuple[Any, torch.Tensor]: The batch without them, and the numbers, int64, shape (M,), on the CPU.

        Raises:
            ValueError: If there are none, or one is outside the data set.
        """
        try:
            batch, numbers = _without_number(batch) if self.key is None else _without(batch, self.key)
        except (LookupError, TypeError, AttributeError) as error:
            where = repr(NUMBER_KEY if self.key is None else self.key)
            raise ValueError(
                f"A batch ({type(batch).__name__}) has no sample numbers at {where}. Check sample_id_key, or, of "
                "data that number_samples has wrapped, that the loader's collate_fn is the wrapped data set's."
            ) from error
        numbers = torch.as_tensor(numbers).detach().cpu()
        if numbers.is_floating_point() or numbers.dtype == torch.bool or numbers.dim() != 1:
            raise ValueError(
                f"Sample numbers must be integers, one for each sample; got {numbers.dtype} of shape "
                f"{tuple(numbers.shape)}. Check sample_id_key={self.key!r}, and that the loader's collate_fn is the "
                "wrapped data set's."
            )
        numbers = numbers.long()
        if len(numbers) and (int(numbers.min()) < 0 or (self.size is not None and int(numbers.max()) >= self.size)):
            raise ValueError(
                f"A batch has sample numbers from {int(numbers.min())} to {int(numbers.max())}, but the data set has "
                f"{self.size} samples, 0 to {'?' if self.size is None else self.size - 1}. Check sample_id_key."
            )
        return batch, numbers


def _without(batch: Any, key: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        bare: Any = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        return bare, bare.pop(key)
    items = list(batch)
    numbers = items.pop(key)
    return (type(batch)(items) if _is_plain(batch) else items), numbers
