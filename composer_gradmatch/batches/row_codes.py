"""Rows of tensors and lists: where in memory they are, and codes that are equal where rows are."""

from __future__ import annotations

import math
import numbers
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from composer_gradmatch.batches.nests import children, is_array

__all__ = ["VALUES", "as_tensor", "codes_of_objects", "codes_of_tensors", "is_all_of", "is_equal", "rows_in_memory"]

#: Values that two samples may share without being the same.
VALUES = (str, bytes, int, float, complex, bool, type(None), np.generic)


def rows_in_memory(part: torch.Tensor, whole: torch.Tensor) -> list[int] | None:
    """Tells which rows of ``whole`` a view shows, whole ones or the same part of each; None if it is no such view."""
    if part.device != whole.device or part.dtype != whole.dtype or not part.dim() or not part.numel():
        return None
    if not (_has_memory(part) and _has_memory(whole)) or not whole.numel() or whole.stride(0) == 0:
        return None
    stride, n = whole.stride(0), len(part)
    first, offset = divmod(_elements_apart(part, whole), stride)
    step, remainder = divmod(part.stride(0), stride) if n > 1 else (0, 0)
    like = part.shape[1:] == whole.shape[1:] and part.stride()[1:] == whole.stride()[1:]
    inside = stride >= _span(whole) >= offset + _span(part)
    last = first + step * (n - 1)
    if remainder or not ((like and not offset) or inside) or first < 0 or last >= len(whole):
        return None
    return [first + step * i for i in range(n)]


def is_all_of(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Tells whether a tensor shows all rows of another one, in their order and in the same memory."""
    if part.shape != whole.shape or part.dtype != whole.dtype:
        return False
    if _has_memory(part) and _has_memory(whole) and part.numel() and whole.stride(0) and part.is_set_to(whole):
        return True
    return rows_in_memory(part, whole) == [*range(len(whole))]


def _span(tensor: torch.Tensor) -> int:
    """Tells how many elements of memory a row reaches over."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _elements_apart(part: torch.Tensor, whole: torch.Tensor) -> int:
    """Tells how far in memory one tensor is behind another; of tensors without values, in a storage that both have."""
    if part.device.type != "meta":
        return (part.data_ptr() - whole.data_ptr()) // whole.element_size()
    same = part.untyped_storage()._cdata == whole.untyped_storage()._cdata
    return int(part.storage_offset()) - int(whole.storage_offset()) if same else -1


def codes_of_objects(part: list[Any], whole: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Does the same for two lists of samples' values."""
    known: dict[Any, int] = {}
    recorded = [known.setdefault(_value(item), len(known)) for item in whole]
    now = [known.get(_value(item), -1) for item in part]
    return torch.tensor(now), torch.tensor(recorded)


def _value(item: Any) -> Any:
    """Makes something hashable that is equal where two samples' values are."""
    if is_array(item):
        tensor = as_tensor(item)
        if not isinstance(tensor, torch.Tensor):
            return ("array", item.shape, *map(_value, item.flatten().tolist()))
        if not _has_memory(tensor):
            return ("object", id(item))
        return ("tensor", tensor.dtype, tuple(tensor.shape), int(_row_codes(tensor[None])))
    parts = children(item)
    if parts is not None:
        return (type(item), frozenset((key, _value(value)) for key, value in parts))
    if isinstance(item, numbers.Number | np.generic) and item != item:
        return "nan"
    try:
        hash(item)
    except TypeError:
        return ("object", id(item))
    return ("value", item)


def codes_of_tensors(part: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes on the CPU that are equal where rows are; of a part of each row, where ``part`` is a leading one."""
    if part.dtype != whole.dtype or part.dim() != whole.dim() or not part.dim():
        return None
    if not (_has_memory(part) and _has_memory(whole)):
        return None
    if part.shape[1:] != whole.shape[1:]:
        if any(one > other for one, other in zip(part.shape[1:], whole.shape[1:], strict=True)):
            return None
        whole = whole[(slice(None), *(slice(size) for size in part.shape[1:]))]
    return _row_codes(part).cpu(), _row_codes(whole).cpu()


def _row_codes(tensor: torch.Tensor) -> torch.Tensor:
    """Gives a number for each row: products with fixed random integers, modulo 2⁶⁴, of the elements' bits."""
    flat = tensor.detach()
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj())
    flat = flat.reshape(len(flat), math.prod(flat.shape[1:]))
    if flat.is_floating_point() and flat.element_size() > 1:
        flat = (flat + 0.0).masked_fill(flat.isnan(), float("nan"))  # -0.0 becomes 0.0, and NaNs one NaN.
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    elif flat.is_floating_point():
        flat = flat.view(torch.uint8)
    return (flat.long() * _multipliers(flat.shape[1], flat.device)).sum(1)


@lru_cache(maxsize=32)
def _multipliers(number: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0x9E3779B9)
    return torch.randint(-(2**63), 2**63 - 1, (number,), generator=generator, dtype=torch.int64).to(device)


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tells whether two tensors are alike; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def as_tensor(leaf: Any) -> Any:
    """Gives an array of numbers as a tensor of the same memory."""
    if not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "biufc" or min(leaf.strides, default=0) < 0:
        return leaf
    try:
        return torch.from_numpy(leaf)
    except TypeError:
        return leaf
