"""Which leaves of a batch are per sample: by their lengths, by how lists read, and by what other batches show.

A list of length M can be read in two ways: as M samples' values, or as parts of a nest that happen to be M. It is a
nest if all of its tensors have leading length M (``[left, right]`` of two samples), or if some have and its items are
of different kinds (``(inputs, targets, class_weights)`` of three). A tensor that belongs to the batch as a whole may
have length M by chance. What other batches show of both is remembered by the names that :func:`names_by_length`
returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from composer_gradmatch.batches.nests import children, is_array, is_flat, is_sequence, join, named_leaves

__all__ = ["holds_arrays", "length", "names_by_length", "refuse_packed", "sample_names"]

#: What has a length that is not one of samples.
_SIZED = (str, bytes, bytearray, set, frozenset, torch.Size)
#: Stands for a list of parts.
_PARTS = object()


def sample_names(batch: Any, num_samples: int, whole: Set[str] = frozenset()) -> frozenset[str]:
    """Gives the dotted names of a batch's sample leaves: those that :func:`take_samples` picks from.

    Args:
        batch (Any): A batch of ``num_samples`` samples.
        num_samples (int): M.
        whole (Set[str], optional): Names from :func:`names_by_length` of other batches. Default: ``frozenset()``.

    Raises:
        ValueError: If it holds something that cannot be picked from.
    """
    leaves = _read(batch, "", num_samples, whole)
    for name, leaf, n in leaves:
        if n is None and name not in whole:
            _check_pickable(leaf, name, num_samples)
    return frozenset(name for name, _, n in leaves if n == num_samples and name not in whole)


def names_by_length(batch: Any, num_samples: int) -> dict[str, int]:
    """Gives the dotted names of what in a batch has another leading length than M, and these lengths.

    What has another length in one batch is not per sample in any, even where its length is M by chance. A list of
    another length than M is named, too, whose items are the parts of a nest; and ``name.*`` names the items of a list
    of M samples' values that have other lengths than M, so that they will not be taken for parts.

    Args:
        batch (Any): A batch of ``num_samples`` samples, a whole one or a microbatch.
        num_samples (int): M.

    Returns:
        dict[str, int]: The union of their keys over batches is the ``whole`` of the other functions.
    """
    found: dict[str, int] = {}
    for name, leaf, n in _read(batch, "", num_samples, frozenset()):
        if n == num_samples and is_sequence(leaf):
            name = join(name, "*")
            n = next((k for item in leaf if (k := length(item)) not in (None, 0, num_samples)), None)
        if n not in (None, 0, num_samples):
            found[name] = n
    return found


def _read(value: Any, name: str, num_samples: int, whole: Set[str]) -> list[tuple[str, Any, int | None]]:
    """Gives the leaves of a batch with their names and lengths, lists of samples' values among them.

    A list of another length than M whose items are parts stands among them as ``_PARTS``.
    """
    if isinstance(value, PackedSequence):
        refuse_packed(value)
    parts = children(value)
    if parts is None or (name in whole and not holds_arrays(value)):
        return [(name, value, length(value))]
    as_samples = len(parts) == num_samples and name not in whole and is_sequence(value)
    if as_samples and _are_samples(value, num_samples):
        return [(name, value, num_samples)]
    if not name and is_flat(value):
        leaves: list[tuple[str, Any, int | None]] = [(each, leaf, length(leaf)) for each, leaf in named_leaves(value)]
    else:
        leaves = [leaf for key, item in parts for leaf in _read(item, join(name, key), num_samples, whole)]
    if not is_sequence(value):
        return leaves if isinstance(value, Mapping) or not hasattr(value, "__len__") else [*leaves, (name, value, None)]
    inner = [n for _, leaf, n in leaves if leaf is not _PARTS and (n is not None or is_array(leaf))]
    if as_samples:
        return leaves if _is_nest(value, name, inner, num_samples, whole) else [(name, value, num_samples)]
    if inner and (all(n == num_samples for n in inner) or holds_arrays(value)):
        return [*leaves, (name, _PARTS, len(value))]
    return [(name, value, len(value))]


def _are_samples(value: Any, num_samples: int) -> bool:
    """Tells whether the first item and the kinds of the others show that a list of length M is no nest."""
    first, *others = value
    if isinstance(first, str | int | float):
        return all(isinstance(item, str | int | float) for item in others)
    kind = _kind(first)
    if any(_kind(item) != kind for item in others):
        return False
    lengths = [n for _, leaf, n in _read(first, "", num_samples, frozenset()) if n is not None or is_array(leaf)]
    return any(n != num_samples for n in lengths)


def _is_nest(value: Any, name: str, inner: list[int | None], num_samples: int, whole: Set[str]) -> bool:
    """Tells whether a list of length M is one of parts, by the lengths of the leaves in it."""
    if join(name, "*") in whole or num_samples not in inner:
        return False
    if not holds_arrays(value) and name:
        return False
    if all(n == num_samples for n in inner):
        return True
    kinds = {_kind(item) for item in value if item is not None and not (is_array(item) and 0 in item.shape)}
    return len(kinds) > 1


def _kind(item: Any) -> Any:
    if is_array(item):
        return type(item), item.ndim, item.dtype
    return (type(item), *item) if isinstance(item, Mapping) else type(item)


def holds_arrays(value: Any) -> bool:
    """Tells whether a tensor or an array is in a nest."""
    parts = children(value)
    return is_array(value) if parts is None else any(holds_arrays(item) for _, item in parts)


def refuse_packed(batch: Any) -> None:
    """Raises if a ``PackedSequence`` is in a batch."""
    if isinstance(batch, PackedSequence):
        raise ValueError(
            "The batch holds a PackedSequence, whose rows are time steps of several samples, so that samples cannot be "
            "picked from it. Pad the sequences (torch.nn.utils.rnn.pad_sequence) and let the model pack them."
        )
    for _, item in children(batch) or ():
        refuse_packed(item)


def length(leaf: Any) -> int | None:
    """Gives the leading length of what may be a sample leaf."""
    if isinstance(leaf, torch.Tensor) and leaf.is_nested:
        return leaf.size(0)
    if is_array(leaf):
        return leaf.shape[0] if leaf.ndim else None
    return len(leaf) if is_sequence(leaf) or isinstance(leaf, range) or hasattr(leaf, "iloc") else None


def _check_pickable(leaf: Any, name: str, num_samples: int) -> None:
    """Raises if what is no tensor, array or list has M samples."""
    if is_array(leaf) or isinstance(leaf, _SIZED) or not hasattr(leaf, "__len__") or len(leaf) != num_samples:
        return
    if any(length(item) == num_samples for _, item in children(leaf) or ()):
        return
    where = f" ({name})" if name else ""
    raise ValueError(
        f"The batch holds {num_samples} samples in a {type(leaf).__name__}{where}, from which they cannot be picked. "
        "Let the data set's collate function return tensors, arrays or lists, in tuples, dicts or objects."
    )
