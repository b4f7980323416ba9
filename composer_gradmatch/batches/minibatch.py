"""A minibatch as rows: counting its samples, and taking some of them.

A batch is a nest of tuples, named tuples, lists, mappings and objects with attributes, or one tensor. Its *sample
leaves* are the tensors and arrays of leading length M, and the lists of M values (strings, tensors, arrays, dicts,
objects); everything else belongs to the batch as a whole.

:mod:`.sample_leaves` says how lists are read, and how what is per sample only by chance is told from the rest::

    whole |= names_by_length(batch, num_samples).keys()   # of each minibatch, and of microbatches as they come
    part = take_samples(batch, indices, num_samples, whole)
    model(copy_batch(batch))                              # for what may change its batch in place

:mod:`.picked_rows` recognises samples later on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

from composer_gradmatch.batches.nests import children, is_array, is_sequence, map_nest, named_leaves, resized
from composer_gradmatch.batches.sample_leaves import holds_arrays, length, refuse_packed, sample_names

__all__ = [
    "copy_batch",
    "copy_structure",
    "count_samples",
    "describe_targets",
    "get_item",
    "map_tensors",
    "take_samples",
    "targets_key",
    "tensor_leaves",
]

#: How many leaves an error message describes.
_SHOWN = 4


def get_item(batch: Any, key: Any, name: str) -> Any:
    """Tells what ``key`` names in a batch, by Composer's rules, or a clear error that tells which parameter is wrong.

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
    """Counts the samples M of a batch: the common leading length of its inputs and targets.

    Where inputs or targets are a list, M may be the list's length: that in which both agree. A mapping (a dict,
    HuggingFace's ``BatchEncoding``) that has neither the key 0 nor 1 and an object with attributes need no keys if all
    of their tensors have the same leading length. Of a batch that is one tensor, or a list of single samples, indices
    name no inputs and targets.

    Args:
        batch (Any): A batch.
        input_key (Any, optional): Where its inputs are. Default: ``0``.
        target_key (Any, optional): Where its targets are. Default: ``1``.

    Raises:
        ValueError: If a key names nothing, lengths differ, or something has no length.
    """
    by_index = isinstance(input_key, int) and isinstance(target_key, int)
    if by_index and _is_list_of_samples(batch):
        return len(batch)
    if by_index and is_array(batch):
        n = length(batch)
        if n is None:
            raise ValueError(f"The batch is one tensor {_describe(batch)}, which has no samples. Check the data set.")
        return n
    if (input_key, target_key) == (0, 1) and _needs_no_keys(batch):
        return _common_length(batch)
    return _length_at_keys(batch, input_key, target_key)


def targets_key(batch: Any, target_key: Any) -> Any:
    """Tells where a batch has its targets: at ``"labels"`` of a mapping that has no key 1, the default."""
    if isinstance(batch, Mapping) and target_key == 1 and 1 not in batch and "labels" in batch:
        return "labels"
    return target_key


def describe_targets(batch: Any, target_key: Any) -> str:
    """Gives the targets' key, shape and range, for an error message."""
    target_key = targets_key(batch, target_key)
    if is_array(batch) and isinstance(target_key, int):
        return f"the batch itself, one tensor {_describe(batch)}"
    try:
        targets = get_item(batch, target_key, "target_key")
    except ValueError:
        return "not found; pass target_key to see them here"
    leaves = [leaf for leaf in tensor_leaves(targets) if leaf.numel()]
    shown = [f"{_describe(leaf)} with values from {leaf.min().item()} to {leaf.max().item()}" for leaf in leaves]
    return f"batch[{target_key!r}], {', '.join(shown)}"


def take_samples(
    batch: Any,
    indices: torch.Tensor | slice,
    num_samples: int,
    whole: Set[str] = frozenset(),
    names: Set[str] | None = None,
) -> Any:
    """Takes the batch of the picked samples, in the order of ``indices``; the given batch is not changed.

    A tensor that is in the batch twice is in the new one twice.

    Args:
        batch (Any): A batch of ``num_samples`` samples.
        indices (torch.Tensor | slice): The picks, int64, shape (n,); or a slice of the batch, whose tensors are
            then views.
        num_samples (int): M, which tells sample leaves from the rest.
        whole (Set[str], optional): Names from :func:`names_by_length` of other batches: of what is not per sample
            though its length is M here. Default: ``frozenset()``.
        names (Set[str], optional): What :func:`sample_names` found in this batch; None to look. Default: ``None``.

    Returns:
        Any: A batch of the same structure and types.

    Raises:
        ValueError: If the batch holds nothing that can be picked from, or something that cannot be.
    """
    names = sample_names(batch, num_samples, whole) if names is None else names
    if not names:
        raise ValueError(
            f"Cannot pick samples from the batch, a {type(batch).__name__}: it holds no tensor, array or list of "
            f"{num_samples} samples. Let the data set's collate function return tensors with one row for each sample, "
            "in a tuple, a dict or an object with attributes."
        )
    taken: dict[int, Any] = {}

    def take(name: str, leaf: Any) -> Any:
        if name not in names:
            return leaf
        if id(leaf) not in taken:
            taken[id(leaf)] = _rows_of(leaf, indices)
        return taken[id(leaf)]

    return map_nest(take, batch, names)


def copy_batch(batch: Any) -> Any:
    """Copies a batch that a model may change as it likes: new containers, and clones of tensors and arrays.

    A tensor that is in the batch twice is in the copy twice; a view is cloned without what is around it. Strings,
    numbers and what has no parts to copy are shared.

    Args:
        batch (Any): A batch.
    """
    made: dict[int, Any] = {}

    def copied(_: str, leaf: Any) -> Any:
        if id(leaf) not in made:
            made[id(leaf)] = _copied(leaf)
        return made[id(leaf)]

    return map_nest(copied, batch)


def copy_structure(batch: Any) -> Any:
    """Puts the same leaves in new containers."""
    return map_nest(lambda _, leaf: leaf, batch)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    """Gives the same batch with each tensor replaced by what ``function`` makes of it, in the order of the leaves."""

    def mapped(_: str, leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return map_nest(mapped, batch, twins=False)


def tensor_leaves(batch: Any) -> Iterator[torch.Tensor]:
    """Goes through the tensors of a nest, in a fixed order; those of a list of samples' tensors one by one."""
    return (leaf for _, leaf in named_leaves(batch) if isinstance(leaf, torch.Tensor))


def _needs_no_keys(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return not {0, 1} & batch.keys()
    return not is_sequence(batch) and not hasattr(batch, "__getitem__") and children(batch) is not None


def _common_length(batch: Any) -> int:
    """Finds M of a batch without keys: what its tensors agree on; where it has none, its lists."""
    refuse_packed(batch)
    possible = [_lengths(item) for _, item in children(batch) or () if holds_arrays(item)]
    if not possible:
        possible = [found for _, item in children(batch) or () if (found := _lengths(item))]
    common = _agreed([found for found in possible if found != []])
    if not common:
        shown = ", ".join(f"{name} {_describe(leaf)}" for name, leaf in named_leaves(batch) if length(leaf) is not None)
        raise ValueError(
            "Cannot tell the number of samples of a batch whose tensors disagree on their leading length: "
            f"{shown or 'no tensor at all'}. "
            "Check the collate function; or, if some are not per sample, name two that are: input_key and target_key, "
            "e.g. input_key='input_ids', target_key='labels'."
        )
    return common[0]


def _is_list_of_samples(batch: Any) -> bool:
    """Tells whether a batch is a list of single samples, of which indices name no inputs and targets.

    Such are strings and numbers, and tuples or dicts of one kind that have scalars in them.
    """
    if not isinstance(batch, list) or len(batch) < 2:
        return False
    if all(isinstance(item, str | int | float) for item in batch):
        return True
    parts = children(batch[0])
    alike = parts is not None and len({(type(item), len(children(item) or ())) for item in batch}) == 1
    return alike and any(
        isinstance(item, int | float) or (is_array(item) and not item.ndim) for _, item in named_leaves(batch[0])
    )


def _length_at_keys(batch: Any, input_key: Any, target_key: Any) -> int:
    inputs, targets = get_item(batch, input_key, "input_key"), get_item(batch, target_key, "target_key")
    for held in (batch, inputs, targets):
        refuse_packed(held)
    possible = [_lengths(inputs), _lengths(targets)]
    common = _agreed(possible)
    if common:
        return common[0]
    shown = []
    for name, key, held, found in (
        ("input_key", input_key, inputs, possible[0]),
        ("target_key", target_key, targets, possible[1]),
    ):
        leaves = [leaf for _, leaf in named_leaves(held, () if holds_arrays(held) or not is_sequence(held) else {""})]
        shown.append(", ".join(map(_describe, leaves[:_SHOWN])) + (", ..." if len(leaves) > _SHOWN else ""))
        disagree = found is None or len({length(leaf) for leaf in leaves} - {None}) > 1
        if not found or disagree:
            raise ValueError(
                f"{name}={key!r} names {'tensors that disagree' if disagree else 'nothing with a leading length'} "
                f"in the batch: {shown[-1]}. Expected tensors with one row for each sample."
            )
    many, others = (found[0] for found in possible if found)
    raise ValueError(
        f"The inputs (input_key={input_key!r}, {shown[0]}) have {many} samples "
        f"but the targets (target_key={target_key!r}, {shown[1]}) have "
        f"{others}. Both need one row for each sample: check the keys and the data set's "
        "collate function."
    )


def _agreed(possible: Sequence[list[int] | None]) -> list[int]:
    """Gives the lengths that all have among theirs, in the order of the first."""
    first, *others = possible or [[]]
    common = first or []
    for other in others:
        common = [n for n in common if other is not None and n in other]
    return common


def _lengths(value: Any) -> list[int] | None:
    """The numbers of samples that a part of a batch can be read as, the likelier first; [] where it has no length.

    None where its tensors disagree.
    """
    parts = children(value)
    if parts is None:
        n = length(value)
        return [] if n is None else [n]
    each = [found for _, item in parts if (found := _lengths(item)) != []]
    nest = _agreed(each) if each else []
    if not is_sequence(value):
        return nest if nest or not each else None
    # Python's own lists are samples' values sooner than parts.
    return list(dict.fromkeys([*nest, len(value)] if holds_arrays(value) else [len(value), *nest]))


def _rows_of(leaf: Any, indices: torch.Tensor | slice) -> Any:
    """Gives the rows of a sample leaf."""
    if isinstance(leaf, torch.Tensor) and not leaf.is_nested and leaf.layout == torch.strided:
        return leaf[indices if isinstance(indices, slice) else indices.to(leaf.device)]
    # In Python, which makes the host wait for what a GPU has picked.
    at = indices if isinstance(indices, slice) else indices.tolist()
    if isinstance(leaf, torch.Tensor):
        chosen = list(range(length(leaf) or 0)[at] if isinstance(at, slice) else at)
        if not leaf.is_nested:
            return leaf.index_select(0, torch.tensor(chosen, device=leaf.device))
        parts = leaf.unbind()
        return torch.nested.as_nested_tensor([parts[i] for i in chosen], layout=leaf.layout)
    if hasattr(leaf, "iloc"):
        return leaf.iloc[at]
    if isinstance(at, slice):
        return leaf[at] if isinstance(leaf, np.ndarray) else resized(leaf, list(leaf)[at])
    return leaf[np.asarray(at)] if isinstance(leaf, np.ndarray) else resized(leaf, [leaf[i] for i in at])


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone().requires_grad_() if leaf.requires_grad else leaf.clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) or hasattr(leaf, "iloc") else leaf


def _describe(leaf: Any) -> str:
    """Gives a leaf's shape, for an error message."""
    if isinstance(leaf, torch.Tensor) and leaf.is_nested:
        return f"a nested tensor of {leaf.size(0)}"
    if is_array(leaf):
        return f"of shape {tuple(leaf.shape)}"
    return f"a {type(leaf).__name__}" + (f" of length {len(leaf)}" if is_sequence(leaf) else "")
