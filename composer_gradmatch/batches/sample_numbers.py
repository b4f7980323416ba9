"""The number of each sample in its data set: put into batches by a wrapped data set, and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

__all__ = ["NUMBER_KEY", "NumberedSamples", "beside_numbers", "has_numbers", "number_samples", "without_numbers"]

#: What numbers stand under, in a batch that is a mapping, or in the last item of one that is a tuple or a list.
NUMBER_KEY = "sample_number"


class Numbered(NamedTuple):
    """A sample, or a batch, that is neither a mapping nor a plain tuple or list, beside its number."""

    item: Any
    number: Any


def _is_plain(item: Any) -> bool:
    return type(item) in (tuple, list)


def has_numbers(batch: Any) -> bool:
    """Tells whether a sample, or a batch, has numbers of :func:`number_samples`."""
    if _is_plain(batch):
        # Under a key, so that targets are not taken for numbers where something has dropped these.
        return len(batch) > 0 and isinstance(batch[-1], Mapping) and set(batch[-1]) == {NUMBER_KEY}
    return isinstance(batch, Numbered) or (isinstance(batch, Mapping) and NUMBER_KEY in batch)


def _with_number(item: Any, number: Any) -> Any:
    if has_numbers(item):
        raise ValueError(
            f"a sample already has a number, under the key {NUMBER_KEY!r}. Number the data set once, the outermost one "
            "that the loader is given; or name numbers that it has by sample_id_key."
        )
    if isinstance(item, Mapping):
        numbered: Any = copy.copy(item) if isinstance(item, MutableMapping) else dict(item)
        numbered[NUMBER_KEY] = number
        return numbered
    if _is_plain(item):
        return type(item)([*item, {NUMBER_KEY: number}])
    return Numbered(item, number)


def take_numbers(item: Any) -> tuple[Any, Any]:
    """Takes the numbers out of a sample, or a batch, that has some; it is not changed itself."""
    if isinstance(item, Mapping):
        bare: Any = copy.copy(item) if isinstance(item, MutableMapping) else dict(item)
        return bare, bare.pop(NUMBER_KEY)
    if isinstance(item, Numbered):
        return item.item, item.number
    return type(item)(item[:-1]), item[-1][NUMBER_KEY]


def parts_of(dataset: Any) -> Iterator[Any]:
    """Goes through a data set and those that it is made of.

    Args:
        dataset (Any): A data set.
    """
    yield dataset
    own = getattr(dataset, "__dict__", {})
    several = own.get("datasets")
    for part in (own.get("dataset"), *(several if isinstance(several, list | tuple) else ())):
        if part is not None:
            yield from parts_of(part)


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
        if any(isinstance(part, NumberedSamples) for part in parts_of(dataset)):
            raise ValueError(
                f"the data set ({type(dataset).__name__}) has numbered samples in it already. Number the data set "
                "once, the outermost one that the loader is given; a Subset of numbered samples keeps their numbers."
            )
        self.dataset = dataset
        self._collate = default_collate if collate_fn is None else collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def _number(self, index: Any) -> int:
        number = int(index)
        return number + len(self) if number < 0 else number

    def __getitem__(self, index: Any) -> Any:
        return _with_number(self.dataset[index], self._number(index))

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(indices)
            return [_with_number(item, self._number(i)) for i, item in zip(indices, items, strict=True)]
        return [self[index] for index in indices]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("dataset", "_collate"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def collate_fn(self, items: list[Any]) -> Any:
        """Collates numbered samples by the data loader's own function, which does not see the numbers."""
        bare, numbers = zip(*map(take_numbers, items), strict=True)
        batch = self._collate(list(bare))
        # A batch of another kind than its samples is marked by its kind as theirs are.
        return _with_number(batch, torch.tensor(numbers))


def number_samples(dataset: Any, collate_fn: Callable[[list[Any]], Any] | None = None) -> NumberedSamples:
    """Wraps a map-style data set, so that strategies with ``refresh`` know each sample again.

    The selecting algorithm takes the numbers out of each batch before model, loss or other algorithms see it, with or
    without ``refresh``, and in evaluation, too. Give the loader the wrapped data set's ``collate_fn``::

        numbered = number_samples(dataset)  # number_samples(dataset, collate_fn=mine) for a collate function of yours
        DataLoader(numbered, batch_size=128, collate_fn=numbered.collate_fn, sampler=dist.get_sampler(numbered))

    What sees batches before the algorithm, the functions of a ``DataSpec``, sees the numbers, too. Wrap its
    ``batch_transforms`` by :func:`beside_numbers`, and let what counts samples or tokens count those of
    :func:`without_numbers`. A Trainer without a selecting algorithm needs data that are not numbered, or
    ``DataSpec(loader, batch_transforms=without_numbers)``.

    Args:
        dataset (Dataset): Map-style: it has ``__getitem__`` and ``__len__``. One that is numbered stays as it is.
        collate_fn (Callable, optional): Makes a batch of a list of its samples; None for torch's.
            Default: ``None``.

    Returns:
        NumberedSamples: The same samples, with their numbers.

    Raises:
        TypeError: If it is an iterable data set, or no data set.
        ValueError: If it is made of samples that are numbered already.
    """
    if isinstance(dataset, NumberedSamples):
        return dataset if collate_fn is None else NumberedSamples(dataset.dataset, collate_fn)
    return NumberedSamples(dataset, collate_fn)


def without_numbers(batch: Any) -> Any:
    """Takes the numbers of :func:`number_samples` out of a batch, if it has some; it is not changed itself."""
    return take_numbers(batch)[0] if has_numbers(batch) else batch


def beside_numbers(transform: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Lets a transform of batches see them without the numbers of :func:`number_samples`, and puts these back.

    Args:
        transform (Callable): Makes a batch of a batch, of as many samples in the same order::

            DataSpec(loader, batch_transforms=beside_numbers(transform))
    """

    def transformed(batch: Any) -> Any:
        if not has_numbers(batch):
            return transform(batch)
        bare, numbers = take_numbers(batch)
        return _with_number(transform(bare), numbers)

    return transformed
