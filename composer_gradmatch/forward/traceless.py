"""The selection forward pass: leaves no trace in the model or the random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import Precision, get_precision_context
from composer.devices import Device
from composer.utils import dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from composer_gradmatch.batches import copy_structure, get_item
from composer_gradmatch.forward.traces import ModelTraces

__all__ = [
    "Generators",
    "Moment",
    "back_at",
    "check_scale_factor",
    "is_sharded",
    "largest_on_all_ranks",
    "needs_all_ranks",
    "no_trace",
    "precision_context",
    "scale_inputs",
    "sum_on_all_ranks",
    "unwrap",
]

_INTERPOLATION = {3: "linear", 4: "bilinear", 5: "trilinear"}


@contextmanager
def no_trace(model: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> Iterator[ModelTraces]:
    """Puts a model and the random number generators back as they were, bit for bit, when the context closes.

    Forward passes in training mode update BatchNorm's statistics, draw dropout masks, count their calls; a pass that
    only selects must not. Of FSDP's modules only the buffers: their attributes are FSDP's business.

    Args:
        model (nn.Module): The model that runs inside the context.
        parameters (Sequence[nn.Parameter], optional): Its parameters that forward changes, which are put back, too.
            Default: ``()``.

    Yields:
        ModelTraces: What is put back, which tells of other parameters that were changed.
    """
    generators = Generators.now()
    traces = ModelTraces(model, attributes=not is_sharded(model), contents_of=parameters)
    try:
        yield traces
    finally:
        generators.restore()
        traces.restore()


@dataclass(frozen=True, eq=False)
class Generators:
    """The states of the random number generators of torch (CPU and the current CUDA device), numpy and Python."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    cpu: torch.Tensor
    cuda: torch.Tensor | None
    device: int

    @classmethod
    def now(cls) -> Generators:
        """Their states as they are."""
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        device = torch.cuda.current_device() if cuda else 0
        state: Any = np.random.get_state()
        return cls(
            random.getstate(),
            state,
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if cuda else None,
            device,
        )

    def restore(self) -> None:
        """Puts them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def is_now(self) -> bool:
        """Whether nothing has been drawn since."""
        now = Generators.now()
        return (
            self.python == now.python
            and all(np.array_equal(one, other) for one, other in zip(self.numpy, now.numpy, strict=True))
            and torch.equal(self.cpu, now.cpu)
            and (self.cuda is None or now.cuda is None or torch.equal(self.cuda, now.cuda))
        )


@dataclass(frozen=True, eq=False)
class Moment:
    """A model's buffers and attributes, and the random number generators, at one moment."""

    traces: ModelTraces
    generators: Generators

    @classmethod
    def now(cls, model: nn.Module) -> Moment:
        """As they are."""
        return cls(ModelTraces(model), Generators.now())

    def is_now(self) -> bool:
        """Whether nothing has changed since."""
        return self.generators.is_now() and not self.traces.changed()

    def restore(self) -> None:
        """Puts back what has changed; graphs that have saved what has not stay valid."""
        self.generators.restore()
        self.traces.restore(only_changed=True)


@contextmanager
def back_at(model: nn.Module, moment: Moment | None) -> Iterator[None]:
    """Lets what runs in the context run as at an earlier moment, and goes back to the present.

    Args:
        model (nn.Module): The model.
        moment (Moment, optional): The moment; None where nothing has changed since.
    """
    if moment is None:
        yield
        return
    present = Moment.now(model)
    moment.restore()
    try:
        yield
    finally:
        present.restore()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, whose own work a selection pass does not need."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has spread a model's parameters over the ranks."""
    if not torch.distributed.is_initialized():
        return False
    return any(isinstance(module, FullyShardedDataParallel | FSDPModule) for module in model.modules())


def needs_all_ranks(model: nn.Module) -> bool:
    """Whether ranks must make a model's forward passes together: FSDP's parameters, SyncBatchNorm's statistics."""
    together = (FullyShardedDataParallel, FSDPModule, nn.SyncBatchNorm)
    return dist.get_world_size() > 1 and any(isinstance(module, together) for module in model.modules())


def largest_on_all_ranks(number: int, device: Device) -> int:
    """The largest of the ranks' numbers."""
    value = device.tensor_to_device(torch.tensor([number]))
    dist.all_reduce(value, reduce_operation="MAX")
    return int(value.item())


def sum_on_all_ranks(number: int, device: Device) -> int:
    """The sum of the ranks' numbers."""
    value = device.tensor_to_device(torch.tensor([number]))
    dist.all_reduce(value, reduce_operation="SUM")
    return int(value.item())


@contextmanager
def precision_context(
    precision: Precision, device: Device, precision_config: dict[str, Any] | None = None
) -> Iterator[None]:
    """Composer's context for a precision; on the CPU, where that has no mixed precision, torch's own autocast.

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
    """The batch with its inputs resized as Composer's ``SelectiveBackprop`` does; the given one is not changed.

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
