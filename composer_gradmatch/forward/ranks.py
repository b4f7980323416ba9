"""What a run on several ranks asks of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from composer.devices import Device
from composer.utils import dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from composer_gradmatch.forward.modules import has_module_of, modules_of

__all__ = ["is_sharded", "largest_on_all_ranks", "needs_all_ranks", "sum_on_all_ranks", "unwrap"]

_SHARDED = (FullyShardedDataParallel, FSDPModule)


def unwrap(model: nn.Module) -> nn.Module:
    """Gives the model inside ``DistributedDataParallel``, whose own work a selection pass does not need."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Tells whether FSDP has spread the parameters of one of a model's modules over the ranks."""
    return torch.distributed.is_initialized() and has_module_of(modules, _SHARDED)


def needs_all_ranks(model: nn.Module) -> bool:
    """Whether ranks must make a model's forward passes together: FSDP's parameters, SyncBatchNorm's statistics."""
    return dist.get_world_size() > 1 and has_module_of(modules_of(model), (*_SHARDED, nn.SyncBatchNorm))


def largest_on_all_ranks(number: int, device: Device) -> int:
    """Gives the largest of the ranks' numbers."""
    value = device.tensor_to_device(torch.tensor([number]))
    dist.all_reduce(value, reduce_operation="MAX")
    return int(value.item())


def sum_on_all_ranks(number: int, device: Device) -> int:
    """Gives the sum of the ranks' numbers."""
    value = device.tensor_to_device(torch.tensor([number]))
    dist.all_reduce(value, reduce_operation="SUM")
    return int(value.item())
