"""A minibatch as rows: counting its samples, taking some of them, and recognising them in a microbatch.

A batch is any nest of tuples, lists and mappings. Its *sample leaves* are the tensors and arrays of leading
length M, and the lists of M values (strings, say); everything else belongs to the batch as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = [
    "copy_structure",
    "count_samples",
    "describe_targets",
    "find_rows",
    "get_item",
    "map_tensors",
    "match_rows",
    "take_samples",
    "tensor_leaves",
]


def get_item(batch: Any, key: Any, name: str) -> Any:
    """What ``key`` names in a batch, by Composer's rules, or a clear error that tells which parameter is wrong.

    Args:
        batch (Any): A batch.
        key (Any): An index, a string, a getter, or a pair of getter and setter.
        name (str): The parameter the key came from, for the error message.

    Raises:
        ValueError: If the batch has nothing at that key.
    """
    from composer.utils.batch_helpers import batch_get

    try:
        return batch_get(batch, key)
    except (LookupError, AttributeError, TypeError) as error:
        held = f" with the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
        if isinstance(batch, Sequence):
            held = f" of length {len(batch)}"
        raise ValueError(
            f"{name}={key!r} names nothing in the batch, a {type(batch).__name__}{held}. "
            f"Pass the {name} that holds it: an index, a key, or a pair of a getter and a setter."
        ) from error


def count_samples(batch: Any, input_key: Any = 0, target_key: Any = 1) -> int:
    """The number of samples M of a batch: the common leading length of its inputs and targets.

    A mapping (a dict, HuggingFace's ``BatchEncoding``) that has neither the key 0 nor 1 needs no keys if all of
    its tensors have the same leading length.

    Args:
        batch (Any): A batch.
        input_key (Any, optional): Where its inputs are. Default: ``0``.
        target_key (Any, optional): Where its targets are. Default: ``1``.

    Raises:
        ValueError: If a key names nothing, lengths differ, or something has no length.
    """
    if isinstance(batch, Mapping) and (input_key, target_key) == (0, 1) and not {0, 1} & batch.keys():
        return _common_length(batch)
    return _length_at_keys(batch, input_key, target_key)


def describe_targets(batch: Any, target_key: Any) -> str:
    """The targets' key, shape and range, for an error message."""
    if isinstance(batch, Mapping) and target_key == 1 and 1 not in batch and "labels" in batch:
        target_key = "labels"
    try:
        targets = get_item(batch, target_key, "target_key")
    except ValueError:
        return "not found; pass target_key to see them here"
    leaves = [leaf for leaf in tensor_leaves(targets) if leaf.numel()]
    shown = [f"{_describe(leaf)} with values from {leaf.min().item()} to {leaf.max().item()}" for leaf in leaves]
    return f"batch[{target_key!r}], {', '.join(shown)}"


def _common_length(batch: Mapping) -> int:
    found = {
        name: (n, _describe(leaf))
        for name, leaf in _named_leaves(batch)
        if (n := _length(leaf)) is not None and not isinstance(leaf, list | tuple)
    }
    if len({n for n, _ in found.values()}) != 1:
        shown = ", ".join(f"{name} {described}" for name, (_, described) in found.items()) or "no tensor at all"
        raise ValueError(
            f"Cannot tell the number of samples of a batch whose tensors disagree on their leading length: {shown}. "
            "Check the collate function; or, if some are not per sample, name two that are: input_key and target_key, "
            "e.g. input_key='input_ids', target_key='labels'."
        )
    return next(iter(found.values()))[0]


def _length_at_keys(batch: Any, input_key: Any, target_key: Any) -> int:
    lengths = {}
    for name, key in (("input_key", input_key), ("target_key", target_key)):
        leaves = list(_leaves(get_item(batch, key, name)))
        found = sorted({n for leaf in leaves if (n := _length(leaf)) is not None})
        if len(found) != 1:
            raise ValueError(
                f"{name}={key!r} names {'nothing with a leading length' if not found else 'tensors that disagree'} "
                f"in the batch: {', '.join(map(_describe, leaves))}. Expected tensors with one row for each sample."
            )
        lengths[name] = (found[0], _describe(leaves[0]))
    if lengths["input_key"][0] != lengths["target_key"][0]:
        raise ValueError(
            f"The inputs (input_key={input_key!r}, {lengths['input_key'][1]}) have {lengths['input_key'][0]} samples "
            f"but the targets (target_key={target_key!r}, {lengths['target_key'][1]}) have "
            f"{lengths['target_key'][0]}. Both need one row for each sample: check the keys and the data set's "
            "collate function."
        )
    return lengths["input_key"][0]


def take_samples(batch: Any, indices: torch.Tensor | slice, num_samples: int) -> Any:
    """The batch of the picked samples, in the order of ``indices``; the given batch is not changed.

    Args:
        batch (Any): A batch of ``num_samples`` samples.
        indices (torch.Tensor | slice): The picks, int64, shape (n,); or a slice of the batch, whose tensors are
            then views.
        num_samples (int): M, which tells sample leaves from the rest.

    Returns:
        Any: A batch of the same structure and types.
    """

    def take(leaf: Any) -> Any:
        if _length(leaf) != num_samples:
            return leaf
        if isinstance(indices, slice):
            return leaf[indices]
        if isinstance(leaf, torch.Tensor):
            return leaf[indices.to(leaf.device)]
        if isinstance(leaf, np.ndarray):
            return leaf[indices.cpu().numpy()]
        return type(leaf)(leaf[i] for i in indices.tolist())

    return _map_leaves(take, batch)


def match_rows(microbatch: Any, batch: Any, weights: torch.Tensor) -> torch.Tensor:
    """The weights of a microbatch's samples, in its own order, found by recognising the samples.

    A ``DataSpec`` may split a batch as it likes. Views of the batch's tensors (Composer's default) are
    recognised by their place in memory. Copies are recognised by content; samples that are alike in everything
    get the mean of their weights, which leaves the weighted sum over them as it was.

    Args:
        microbatch (Any): Some samples of ``batch``, in the same structure.
        batch (Any): The batch of the n picked samples.
        weights (torch.Tensor): Their weights, shape (n,).

    Returns:
        torch.Tensor: The weights of the microbatch's samples, on the device of ``weights``.

    Raises:
        ValueError: If samples cannot be recognised beyond doubt.
    """
    pairs = list(zip(tensor_leaves(microbatch), tensor_leaves(batch), strict=False))
    n = len(weights)
    pairs = [(part, whole) for part, whole in pairs if part.dim() and whole.dim() and len(whole) == n]
    for part, whole in pairs:
        rows = _rows_in_memory(part, whole, weights.device)
        if rows is not None:
            return weights[rows]

    complete, same = True, None
    for part, whole in pairs:
        equal = None
        if part.shape[1:] == whole.shape[1:] and part.dtype == whole.dtype:
            equal = _equal_rows(part, whole.to(part.device))
        if equal is None or not equal.any(1).all():
            complete = False  # a transform has changed this tensor
        elif same is None or same.shape == equal.shape:
            same = equal if same is None else same & equal
    if same is not None:
        matches = same.to(weights.device, weights.dtype)
        counts = matches.sum(1)
        means = matches @ weights / counts
        spread = torch.where(matches > 0, (weights - means[:, None]).abs(), 0.0).amax(1)
        if (counts > 0).all() and (complete or (spread == 0).all()):
            return means
    raise ValueError(
        "Cannot tell which of the picked samples a microbatch holds, so their weights cannot reach the loss: the "
        "DataSpec's split_batch copies samples and its microbatch_transforms (or another algorithm) change them. "
        "Let split_batch return slices of the batch's tensors, or move the transform to batch_transforms."
    )


def copy_structure(batch: Any) -> Any:
    """The same leaves in new containers."""
    return _map_leaves(lambda leaf: leaf, batch)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    """The same batch with each tensor replaced by what ``function`` makes of it, in the order of the leaves."""
    return _map_leaves(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, batch)


def find_rows(microbatch: Any, batch: Any, num_samples: int, read: Sequence[bool]) -> torch.Tensor | None:
    """Which samples of a batch a microbatch holds, by the tensors that matter.

    Args:
        microbatch (Any): Some samples of ``batch``, in the same structure.
        batch (Any): The batch of n samples.
        num_samples (int): n.
        read (Sequence[bool]): Which of the batch's tensors matter.

    Returns:
        torch.Tensor | None: Rows, int64, shape (m,), on the CPU; of samples alike in all that matters the first.
        None if something that matters is in no row of the batch.
    """
    parts, wholes = list(tensor_leaves(microbatch)), list(tensor_leaves(batch))
    if len(parts) != len(wholes) or len(wholes) != len(read):
        return None
    same: torch.Tensor | None = None
    found: torch.Tensor | None = None
    for part, whole, matters in zip(parts, wholes, read, strict=True):
        if not matters:
            continue
        if not whole.dim() or len(whole) != num_samples:
            if part is not whole and not (part.shape == whole.shape and torch.equal(part, whole)):
                return None
            continue
        rows = _rows_in_memory(part, whole, torch.device("cpu"))
        if rows is not None and (found is None or (len(rows) == len(found) and bool((found == rows).all()))):
            found = rows
            continue
        if (
            part.shape[1:] != whole.shape[1:]
            or part.dtype != whole.dtype
            or (same is not None and len(part) != len(same))
        ):
            return None
        equal = _equal_rows(part, whole.to(part.device))
        same = equal if same is None else same & equal
    if same is None:
        return found
    if found is not None:
        if len(found) != len(same):
            return None
        at = torch.arange(len(found), device=same.device)
        return found if bool(same[at, found.to(same.device)].all()) else None
    return same.int().argmax(1).cpu() if bool(same.any(1).all()) else None


def tensor_leaves(batch: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nest, in a fixed order."""
    return (leaf for leaf in _leaves(batch) if isinstance(leaf, torch.Tensor))


def _rows_in_memory(part: torch.Tensor, whole: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Which rows of ``whole`` a view of it shows, or None if ``part`` is no view of whole rows."""
    if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or not whole.numel():
        return None
    if part.shape[1:] != whole.shape[1:] or part.stride()[1:] != whole.stride()[1:] or part.dtype != whole.dtype:
        return None
    if whole.stride(0) == 0:
        return None
    first, offset = divmod(int(part.storage_offset() - whole.storage_offset()), whole.stride(0))
    step, remainder = divmod(part.stride(0), whole.stride(0))
    last = first + step * (len(part) - 1)
    if offset or remainder or not len(part) or min(first, last) < 0 or max(first, last) >= len(whole):
        return None
    return first + step * torch.arange(len(part), device=device)


def _equal_rows(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Whether row i of ``part`` equals row j of ``whole``, in every element."""
    return torch.stack([(whole == row).flatten(1).all(1) if whole.dim() > 1 else whole == row for row in part])


def _length(leaf: Any) -> int | None:
    """The leading length of what may be a sample leaf."""
    if isinstance(leaf, torch.Tensor | np.ndarray):
        return len(leaf) if leaf.ndim else None
    return len(leaf) if isinstance(leaf, list | tuple) else None


def _is_nest(value: Any) -> bool:
    """Whether a value is a container of leaves, as against a list of samples' values."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and any(
        isinstance(item, torch.Tensor | np.ndarray) or _is_nest(item) for item in value
    )


def _leaves(value: Any) -> Iterator[Any]:
    return (leaf for _, leaf in _named_leaves(value))


def _named_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf with the dotted path of keys that leads to it."""
    if not _is_nest(value):
        yield name, value
        return
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _named_leaves(item, f"{name}.{key}" if name else str(key))


def _describe(leaf: Any) -> str:
    """A leaf's shape, for an error message."""
    if isinstance(leaf, torch.Tensor | np.ndarray):
        return f"of shape {tuple(leaf.shape)}"
    return f"a {type(leaf).__name__}" + (f" of length {len(leaf)}" if isinstance(leaf, list | tuple) else "")


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    if not _is_nest(value):
        return function(value)
    if isinstance(value, Mapping):
        mapped = copy.copy(value)
        for key, item in value.items():
            mapped[key] = _map_leaves(function, item)  # type: ignore[index]
        return mapped
    items = [_map_leaves(function, item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
