"""Composer's private interfaces."""

from __future__ import annotations

from composer.algorithms.ghost_batchnorm.ghost_batchnorm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from torch import nn

__all__ = ["ghost_batch_size"]


def ghost_batch_size(model: nn.Module) -> int:
    """The fewest samples that a model's ``GhostBatchNorm`` layers take at once; 1 if it has none.

    Args:
        model (nn.Module): The model.
    """
    layers = (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)
    return max((module.ghost_batch_size for module in model.modules() if isinstance(module, layers)), default=1)
