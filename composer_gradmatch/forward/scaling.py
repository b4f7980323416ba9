"""Downsampling the inputs of a selection pass, as Composer's ``SelectiveBackprop`` does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from composer_gradmatch.batches import copy_structure, get_item

__all__ = ["check_scale_factor", "scale_inputs"]

_INTERPOLATION = {3: "linear", 4: "bilinear", 5: "trilinear"}


def check_scale_factor(scale_factor: float) -> None:
    """Checks that inputs are scaled down, not up.

    Args:
        scale_factor (float): The multiplier of the spatial sizes.

    Raises:
        ValueError: If it is outside (0, 1].
    """
    if not 0 < scale_factor <= 1:
        raise ValueError(f"scale_factor must be in (0, 1], the share of the inputs' size; got {scale_factor}.")


def scale_inputs(batch: Any, input_key: Any, scale_factor: float) -> Any:
    """Gives the batch with its inputs resized as Composer's ``SelectiveBackprop`` does; the given one is not changed.

    Args:
        batch (Any): A batch.
        input_key (Any): Where its inputs are.
        scale_factor (float): The multiplier of the spatial sizes, in (0, 1].

    Raises:
        ValueError: If the inputs are not float tensors (M, channels, size[, size[, size]]), or shrink to nothing.
    """
    from composer.utils.batch_helpers import batch_set

    if scale_factor == 1:
        return batch
    inputs = get_item(batch, input_key, "input_key")
    if not isinstance(inputs, torch.Tensor) or inputs.dim() not in _INTERPOLATION or not inputs.is_floating_point():
        got = f"{inputs.dtype}, shape {tuple(inputs.shape)}" if isinstance(inputs, torch.Tensor) else type(inputs)
        raise ValueError(
            f"scale_factor={scale_factor} resizes inputs, which must be float tensors of 3, 4 or 5 dimensions "
            f"(M, channels, size, ...); got {got}. Leave scale_factor at 1."
        )
    if min(inputs.shape[2:]) * scale_factor < 1:
        raise ValueError(f"scale_factor={scale_factor} leaves nothing of inputs of shape {tuple(inputs.shape)}.")
    scaled = F.interpolate(
        inputs,
        scale_factor=scale_factor,
        mode=_INTERPOLATION[inputs.dim()],
        align_corners=False,
        recompute_scale_factor=False,
    )
    return batch_set(copy_structure(batch), input_key, scaled)
