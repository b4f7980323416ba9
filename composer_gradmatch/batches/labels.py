"""The classes of a minibatch's samples, read from its targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from composer_gradmatch.batches.minibatch import get_item, targets_key
from composer_gradmatch.batches.nests import is_array

__all__ = ["class_labels"]


def class_labels(batch: Any, target_key: Any, num_samples: int) -> torch.Tensor:
    """Reads the class of each of the M samples of a batch.

    Args:
        batch (Any): A batch of M samples.
        target_key (Any): Where its targets are: see :func:`.targets_key`.
        num_samples (int): M.

    Returns:
        torch.Tensor: int64, shape (M,), on the targets' device; which numbers stand for the classes does not matter.

    Raises:
        ValueError: If there are no targets, or these are not one integer for each sample.
    """
    if is_array(batch) and isinstance(target_key, int):
        raise _no_classes("the batch is one tensor, which has no targets")
    target_key = targets_key(batch, target_key)
    targets = get_item(batch, target_key, "target_key")
    labels = _as_tensor(targets)
    if labels is None:
        raise _no_classes(f"target_key={target_key!r} names a {type(targets).__name__}")
    fractions = labels.is_floating_point() or labels.is_complex()
    if fractions or labels.shape[:1] != (num_samples,) or labels.numel() != num_samples:
        raise _no_classes(
            f"target_key={target_key!r} names {labels.dtype} of shape {tuple(labels.shape)} for {num_samples} samples"
        )
    return labels.reshape(num_samples).long()


def _as_tensor(targets: Any) -> torch.Tensor | None:
    """Makes one tensor of what holds numbers; None if it holds something else."""
    if isinstance(targets, torch.Tensor):
        return None if targets.is_nested or targets.layout != torch.strided else targets.detach()
    if isinstance(targets, list | tuple) and all(isinstance(each, torch.Tensor) for each in targets):
        return torch.stack([*targets]) if targets and all(not each.dim() for each in targets) else None
    try:
        values = np.asarray(targets)
    except ValueError:  # Of rows of many lengths.
        return None
    if values.dtype.kind in "iub":
        values = values.astype(np.int64)
    return torch.from_numpy(values) if values.dtype.kind in "if" else None


def _no_classes(found: str) -> ValueError:
    return ValueError(
        f"This rule needs the class of each sample: integers, one for each, among the batch's targets; {found}. Pass "
        "the target_key that holds them, or a pair of a getter and a setter whose getter makes classes of the "
        "targets; or use a rule that needs no labels."
    )
