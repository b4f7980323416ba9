"""The precision of a selection pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.core import Precision, get_precision_context
from composer.devices import Device

__all__ = ["precision_context"]


@contextmanager
def precision_context(
    precision: Precision, device: Device, precision_config: dict[str, Any] | None = None
) -> Iterator[None]:
    """Opens Composer's context for a precision; on the CPU, which has no mixed precision there, torch's own autocast.

    Args:
        precision (Precision): The precision.
        device (Device): The device.
        precision_config (dict[str, Any], optional): Composer's, for FP8. Default: ``None``.

    Raises:
        ValueError: If the device does not have it.
    """
    dtypes = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}
    if device.name == "gpu":
        with get_precision_context(precision, precision_config):
            yield
    elif device.name != "cpu":
        raise ValueError(f"selection_precision is for GPUs and CPUs; on {device.name!r} leave it at None.")
    elif precision == Precision.AMP_FP8:
        raise ValueError("selection_precision='amp_fp8' needs a GPU; on the CPU use 'amp_bf16'.")
    else:
        dtype = dtypes.get(precision, torch.bfloat16)
        with torch.autocast("cpu", dtype, enabled=precision in dtypes):
            yield
