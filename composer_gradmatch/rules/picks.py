"""What comes out of a selection: picked samples, or the whole minibatch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["Selection", "WholeBatch"]


@dataclass(frozen=True)
class Selection:
    """The picked samples of one minibatch.

    Attributes:
        indices (torch.Tensor): The picks, int64, shape (n,).
        weights (torch.Tensor, optional): Their weights, shape (n,), float64, with sum n; None means that all are one.
            Default: ``None``.
        metrics (dict, optional): What else to log of the step, numbers or scalar tensors; with weights, also their
            ``effective_sample_size`` and ``largest_weight``. Default: ``{}``.
        matched (torch.Tensor, optional): Whether the picks are chosen at all, a boolean scalar; None where they are.
            Default: ``None``.
    """

    indices: torch.Tensor
    weights: torch.Tensor | None = None
    metrics: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    matched: torch.Tensor | None = None


@dataclass(frozen=True)
class WholeBatch:
    """A minibatch that cannot be selected from and is trained whole.

    Attributes:
        warning (str, optional): What to warn of, once a run. Default: ``None``, for nothing.
    """

    warning: str | None = None
