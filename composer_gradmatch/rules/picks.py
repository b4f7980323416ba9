"""What comes out of a rule: picked samples and their weights, or the whole minibatch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Picks", "WholeBatch", "as_picks"]


@dataclass(frozen=True)
class Picks:
    """The picked samples of one minibatch, so that (1/n)·Σ wᵢgᵢ over them stands for the mean gradient of all.

    Attributes:
        indices (torch.Tensor): The picks, int64, shape (n,), each at most once.
        weights (torch.Tensor, optional): Their weights w, shape (n,), floating point; None means that all are one.
            Default: ``None``.
        metrics (dict, optional): What else to log of the step, numbers or scalar tensors. Default: ``{}``.
        found (torch.Tensor, optional): Whether the picks are chosen at all, a boolean scalar on the device that chose
            them, which the host does not wait for; if not, they are trained with weights one. None where they are.
            Default: ``None``.
    """

    indices: torch.Tensor
    weights: torch.Tensor | None = None
    metrics: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    found: torch.Tensor | None = None


@dataclass(frozen=True)
class WholeBatch:
    """A minibatch that cannot be selected from and is trained whole.

    Attributes:
        warning (str, optional): What to warn of, once a run. Default: ``None``, for nothing.
    """

    warning: str | None = None


def as_picks(result: Any, num_samples: int, rule: str, weighs: bool) -> Picks | WholeBatch:
    """Checks what a rule returned, and makes picks of it.

    Args:
        result (Any): :class:`Picks`, :class:`WholeBatch`, or a pair of indices and weights (None for ones): tensors,
            arrays or lists.
        num_samples (int): M.
        rule (str): The rule's name, for the messages.
        weighs (bool): Whether the rule may give weights.

    Raises:
        TypeError: If it is something else.
        ValueError: If indices are none, out of range or there twice, or weights are not as many, not finite, or were
            not announced.
    """
    if isinstance(result, WholeBatch):
        return result
    if not isinstance(result, Picks):
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"The rule {rule!r} must return Picks or a pair (indices, weights), weights None for ones; got "
                f"{type(result).__name__}."
            )
        indices, weights = result
        result = Picks(torch.as_tensor(indices), None if weights is None else torch.as_tensor(weights))
    indices, weights = result.indices, result.weights
    whole = not indices.is_floating_point() and not indices.is_complex() and indices.dtype != torch.bool
    if indices.dim() != 1 or not len(indices) or not whole:
        raise ValueError(
            f"The rule {rule!r} must return at least one index in one dimension, as integers; got shape "
            f"{tuple(indices.shape)}, {indices.dtype}. To train the minibatch whole, return WholeBatch()."
        )
    if weights is not None and not weighs:
        raise ValueError(
            f"The rule {rule!r} returned weights, but its record says weighs=False, so that nothing has shown that "
            "they would reach the loss. Leave them out (None), or say weighs=True."
        )
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(
            f"The rule {rule!r} returned weights of shape {tuple(weights.shape)} for {len(indices)} indices; expected "
            "one for each, or None."
        )
    if result.found is None:  # Else the host does not wait for them.
        _check_values(indices, weights, num_samples, rule)
    return result if indices.dtype == torch.int64 else Picks(indices.long(), weights, result.metrics, result.found)


def _check_values(indices: torch.Tensor, weights: torch.Tensor | None, num_samples: int, rule: str) -> None:
    picked = indices.tolist()
    if min(picked) < 0 or max(picked) >= num_samples:
        raise ValueError(
            f"The rule {rule!r} returned indices from {min(picked)} to {max(picked)}; expected samples of the "
            f"minibatch, 0 to {num_samples - 1}."
        )
    if len(set(picked)) < len(picked):
        raise ValueError(
            f"The rule {rule!r} picked a sample twice. Pick it once, with a weight that counts it as often."
        )
    if weights is not None and not all(map(math.isfinite, weights.tolist())):
        raise ValueError(f"The rule {rule!r} returned weights that are not finite.")
