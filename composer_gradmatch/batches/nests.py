"""Nests of containers: their leaves by dotted name, and the same nest with other leaves.

A *nest* is a batch of any kind: tuples, named tuples, lists, mappings (``UserDict`` too) and objects with
attributes, in each other. A *leaf* is anything else, tensors, arrays, strings and numbers first of all. Where a
caller says so, a list is a leaf as well: that of the samples' values.
"""

from __future__ import annotations

import copy
import enum
import numbers
import os
import types
from collections import UserDict, UserList, deque
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = [
    "children",
    "is_array",
    "is_flat",
    "is_sequence",
    "map_nest",
    "named_leaves",
    "outline",
    "rebuild",
    "resized",
]

#: What has no parts, tried first.
_PLAIN = frozenset({torch.Tensor, np.ndarray, str, int, float, bool, bytes, complex, type(None), torch.Size, range})
#: What has attributes, but is no container of a batch's leaves.
_WHOLE = (
    *(torch.Tensor, np.ndarray, np.generic, torch.Size, torch.Generator, torch.dtype, torch.device),
    *(str, bytes, numbers.Number, enum.Enum, os.PathLike, type, types.ModuleType, types.FunctionType),
    *(types.MethodType, nn.Module, torch.utils.data.Dataset, torch.utils.data.DataLoader, torch.optim.Optimizer),
)
_FLAT = frozenset({tuple, list, dict})
#: The first indices as names.
_INDICES = [str(i) for i in range(16)]
# Made once: a union of types is made anew wherever it is written.
_ARRAYS = (torch.Tensor, np.ndarray)
_SEQUENCES = (list, tuple, deque, UserList)


def is_array(value: Any) -> bool:
    """Tells whether a value is a tensor or an array."""
    return isinstance(value, _ARRAYS)


def is_sequence(value: Any) -> bool:
    """Tells whether a value is a list, a tuple or the like, which strings are not."""
    return isinstance(value, _SEQUENCES) and not isinstance(value, torch.Size)


def children(value: Any) -> list[tuple[Any, Any]] | None:
    """Gives the parts of a container, each with its key, index or attribute's name; None for a leaf."""
    kind = type(value)
    if kind in _PLAIN:
        return None
    if kind is tuple or kind is list:
        return list(enumerate(value))
    if kind is dict or isinstance(value, Mapping):
        return list(value.items())
    if is_sequence(value):
        return list(enumerate(value))
    if isinstance(value, _WHOLE) or hasattr(value, "iloc"):
        return None  # A table of pandas is indexed whole.
    held = _attributes(value)
    return held if any(not isinstance(item, _WHOLE) or is_array(item) for _, item in held if item is not None) else None


def is_flat(value: Any) -> bool:
    """Tells at a glance whether a value is a tuple, list or dict of leaves alone, as most batches are.

    Of such there is nothing to descend into, which takes longer than most of what is done to the leaves.
    """
    return type(value) in _FLAT and _PLAIN.issuperset(map(type, _leaves_of(value)))


def outline(value: Any) -> Hashable | None:
    """Gives all that tells a flat nest of tensors from others but their numbers: kind, keys, shapes and data types.

    Args:
        value (Any): A nest.

    Returns:
        Hashable | None: None of a nest of other things, or of nests.
    """
    kind = type(value)
    if kind not in _FLAT:
        return None
    kinds = []
    for leaf in _leaves_of(value):
        if type(leaf) is not torch.Tensor or leaf.is_nested:
            return None
        kinds.append((leaf.shape, leaf.dtype))
    return kind, tuple(value) if kind is dict else None, tuple(kinds)


def _leaves_of(value: Any) -> Any:
    return value.values() if type(value) is dict else value


def _names(value: Any) -> Any:
    if type(value) is dict:
        return [join("", key) for key in value]
    return _INDICES[: len(value)] if len(value) <= len(_INDICES) else map(str, range(len(value)))


def named_leaves(
    value: Any, stops: Collection[str] = (), name: str = "", inside: tuple[int, ...] = ()
) -> list[tuple[str, Any]]:
    """Lists each leaf with the dotted path of keys that leads to it, in a fixed order.

    Args:
        value (Any): A nest.
        stops (Collection[str], optional): The names of containers that are leaves here. Default: ``()``.
        name (str, optional): The name of ``value`` itself. Default: ``""``.
        inside (tuple[int, ...], optional): The identities of the containers around it. Default: ``()``.
    """
    if not name and "" not in stops and is_flat(value):
        return list(zip(_names(value), _leaves_of(value), strict=True))
    parts = None if name in stops or id(value) in inside else children(value)
    if parts is None:
        return [(name, value)]
    inside = (*inside, id(value))
    return [leaf for key, item in parts for leaf in named_leaves(item, stops, join(name, key), inside)]


def join(name: str, key: Any) -> str:
    """Gives the name of what a container of that name has at a key."""
    own = str(key).replace(".", "\\.")
    return f"{name}.{own}" if name else own


def map_nest(
    function: Callable[[str, Any], Any], value: Any, stops: Collection[str] = (), *, twins: bool = True
) -> Any:
    """Gives the same nest in new containers, each leaf replaced by what ``function`` makes of its name and itself.

    Args:
        function (Callable): Makes the new leaves.
        value (Any): A nest; it is not changed.
        stops (Collection[str], optional): The names of containers that are leaves here. Default: ``()``.
        twins (bool, optional): Whether a container that is in the nest twice is in the new one twice. Default:
            ``True``; otherwise its leaves are visited twice.
    """
    if "" not in stops and is_flat(value):
        leaves = map(function, _names(value), _leaves_of(value))
        if type(value) is dict:
            return dict(zip(value, leaves, strict=True))
        return tuple(leaves) if type(value) is tuple else list(leaves)
    return _Mapping(function, stops, twins).of(value, "")


class _Mapping:
    """One run of :func:`map_nest`; a function that calls itself would keep what it has made until a collection."""

    def __init__(self, function: Callable[[str, Any], Any], stops: Collection[str], twins: bool) -> None:
        self.function, self.stops, self.twins = function, stops, twins
        self.made: dict[tuple[int, Any], Any] = {}
        self.inside: set[int] = set()

    def of(self, value: Any, name: str) -> Any:
        parts = None if name in self.stops or id(value) in self.inside else children(value)
        if parts is None:
            return self.function(name, value)
        # Twins may be leaves at one name and not at the other.
        twin = id(value), tuple([stop[len(name) :] for stop in self.stops if stop.startswith(name)])
        if not self.twins or twin not in self.made:
            self.inside.add(id(value))
            self.made[twin] = rebuild(value, [(key, self.of(item, join(name, key))) for key, item in parts])
            self.inside.discard(id(value))
        return self.made[twin]


def rebuild(value: Any, parts: list[tuple[Any, Any]]) -> Any:
    """Gives a container of the same kind with other parts, at the same keys; ``value`` is not changed."""
    if type(value) is dict:
        return dict(parts)
    if isinstance(value, Mapping):
        return _rebuilt_mapping(value, parts)
    if is_sequence(value):
        return resized(value, [item for _, item in parts])
    made = _blank(value)
    for name, item in parts:
        object.__setattr__(made, name, item)
    return made


def resized(value: Any, items: list[Any]) -> Any:
    """Gives a list, a tuple or the like of the same type with other items, of any number."""
    kind = type(value)
    if kind is list or kind is range:
        return items
    if kind is tuple:
        return tuple(items)
    if isinstance(value, tuple):
        # Past a constructor of its own.
        made = tuple.__new__(kind, items)
        vars_of(made).update(vars_of(value))
        return made
    made = copy.copy(value)
    made.clear()
    made.extend(items)
    return made


def vars_of(value: Any) -> dict[str, Any]:
    """Gives an object's own attributes, as they are; a dict of its own where it has no room for any."""
    return getattr(value, "__dict__", {})


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Gives the attributes that an object holds itself, those in slots included."""
    slots = [
        name
        for kind in type(value).__mro__
        if "__slots__" in vars(kind)
        for name, member in vars(kind).items()
        if isinstance(member, types.MemberDescriptorType)
    ]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return list((held | vars_of(value)).items())


def _blank(value: Any) -> Any:
    """Gives an object of the same type without attributes: no constructor runs, and frozen ones are not asked."""
    try:
        return object.__new__(type(value))
    except TypeError:
        return copy.copy(value)


def _rebuilt_mapping(value: Mapping[Any, Any], parts: list[tuple[Any, Any]]) -> Any:
    try:
        made: Any = copy.copy(value)
        if not isinstance(value, dict | UserDict):
            # A shallow copy has the same dict inside.
            for name, held in _attributes(made):
                if isinstance(held, dict | list):
                    object.__setattr__(made, name, copy.copy(held))
        for key, item in parts:
            made[key] = item
    except TypeError:
        kind: Any = type(value)
        return kind(dict(parts))
    return made
