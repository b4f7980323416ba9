"""What people can look at in a batch: its samples as images, or as texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import numpy as np
import torch

from composer_gradmatch.batches.minibatch import get_item
from composer_gradmatch.batches.nests import children, is_array, is_sequence, named_leaves

__all__ = ["Decode", "view_samples"]

#: Makes a text of token numbers.
Decode = Callable[[list[int]], str]

#: How many parts of a batch a message describes.
_SHOWN = 4
_CHANNELS = (1, 3, 4)


def view_samples(
    batch: Any, names: Set[str], input_key: Any = 0, decode: Decode | None = None
) -> list[np.ndarray] | list[str]:
    """Gives the samples of a batch as images, or as texts.

    Images are tensors or arrays of shape (C, H, W) or (H, W, C) with C of 1, 3 or 4, or (H, W), and PIL's; texts are
    strings, and rows of token numbers. They are looked for at the inputs, and in the whole batch if these have no key.

    Args:
        batch (Any): A batch.
        names (Set[str]): The names of its sample leaves: see :func:`.sample_names`.
        input_key (Any, optional): Where its inputs are: see :func:`.count_samples`. Default: ``0``.
        decode (Callable, optional): Makes texts of token numbers; None to leave them. Default: ``None``.

    Returns:
        list: A value for each sample: arrays of shape (H, W) or (H, W, 3), or strings.

    Raises:
        ValueError: If its samples are neither.
    """
    candidates = _candidates(batch, names, input_key)
    for name, leaf in candidates:
        rows = _rows(leaf)
        # The choices of a question are rows of tokens, too.
        kinds: tuple[Callable[[Any], Any], ...] = (_image, lambda row: _text(row, decode))
        for view in kinds[::-1] if name.endswith("input_ids") else kinds:
            seen: list[Any] = [view(row) for row in rows]
            if seen and all(each is not None for each in seen):
                return seen
    shown = ", ".join(f"{name or 'the batch'} {_describe(leaf)}" for name, leaf in candidates[:_SHOWN])
    raise ValueError(
        f"the samples are neither images nor texts: found {shown or 'nothing'} (input_key={input_key!r}). Expected "
        "images of shape (C, H, W), (H, W, C) or (H, W) with 1, 3 or 4 channels, strings, or token numbers with a "
        "tokenizer."
    )


def _candidates(batch: Any, names: Set[str], input_key: Any) -> list[tuple[str, Any]]:
    """Lists where to look: the inputs, or all sample leaves with token numbers first."""
    leaves = [(name, leaf) for name, leaf in named_leaves(batch, names) if name in names]
    if "" in names:  # Indices name single samples of it.
        return leaves
    try:
        inputs = get_item(batch, input_key, "input_key")
    except ValueError:
        return sorted(leaves, key=lambda each: not each[0].endswith("input_ids"))
    identities = {id(leaf): name for name, leaf in leaves}
    if id(inputs) in identities:
        return [(identities[id(inputs)], inputs)]
    inside = [leaf for _, leaf in named_leaves(inputs)]
    found = [(identities[id(leaf)], leaf) for leaf in inside if id(leaf) in identities]
    # Of a getter's own making.
    return found or [(f"{input_key!r}", inputs)]


def _rows(leaf: Any) -> Sequence[Any]:
    """Gives what a sample leaf has of each sample."""
    if isinstance(leaf, torch.Tensor):
        leaf = leaf.detach()
        return [*leaf.unbind()] if leaf.is_nested or leaf.dim() else []
    if hasattr(leaf, "iloc"):
        return leaf.to_dict("records") if hasattr(leaf, "columns") else leaf.tolist()
    return [*leaf] if is_array(leaf) or is_sequence(leaf) else []


def _image(value: Any) -> np.ndarray | None:
    if hasattr(value, "convert") and hasattr(value, "mode"):  # One of PIL's.
        return np.asarray(value.convert("RGB"))
    if not is_array(value):
        return next((found for leaf in _parts(value) if (found := _image(leaf)) is not None), None)
    array = _as_array(value)
    if array.dtype.kind not in "fiub" or not array.size or array.ndim not in (2, 3):
        return None
    if array.ndim == 3:
        if array.shape[0] in _CHANNELS:
            array = np.moveaxis(array, 0, -1)
        elif array.shape[-1] not in _CHANNELS:
            return None
        array = array[..., 0] if array.shape[-1] == 1 else array[..., :3]
    return array


def _text(value: Any, decode: Decode | None) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    numbers = _token_numbers(value)
    if numbers is not None:
        # Padding is -100 in some.
        return None if decode is None else " / ".join(decode([i for i in row if i >= 0]) for row in numbers)
    return next((found for leaf in _parts(value) if (found := _text(leaf, decode)) is not None), None)


def _token_numbers(value: Any) -> list[list[int]] | None:
    """Reads rows of token numbers, of which a sample has one, or one for each of its choices; None if it has none."""
    if is_array(value):
        array = _as_array(value)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            return None
        return np.atleast_2d(array).tolist()
    if is_sequence(value) and len(value) and all(type(each) is int for each in value):
        return [[*value]]
    return None


def _as_array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    value = value.to_dense() if value.layout != torch.strided else value
    return (value.float() if value.dtype == torch.bfloat16 else value).resolve_conj().numpy()


def _parts(value: Any) -> Iterator[Any]:
    """Goes through what a sample that is a nest has in it."""
    return (leaf for _, leaf in named_leaves(value)) if children(value) is not None else iter(())


def _describe(leaf: Any) -> str:
    if is_array(leaf):
        return f"{str(leaf.dtype).removeprefix('torch.')} of shape {(len(leaf),) if _nested(leaf) else (*leaf.shape,)}"
    first = f" of {type(leaf[0]).__name__}" if is_sequence(leaf) and len(leaf) else ""
    return f"a {type(leaf).__name__}{first}"


def _nested(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_nested
