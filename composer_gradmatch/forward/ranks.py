"""What a run on several ranks asks of a forward pass."""

from __future__ import annotations

import torch
from composer.devices import Device
from composer.utils import dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

__all__ = ["is_sharded", "largest_on_all_ranks", "needs_all_ranks", "sum_on_all_ranks", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Gives the model inside ``DistributedDataParallel``, whose own work a selection pass does not need."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Tells whether FSDP has spread a model's parameters over the ranks."""
    if not torch.distributed.is_initialized():
        return False
    return any(isinstance(module, FullyShardedDataParallel | FSDPModule) for module in model.modules())


def needs_all_ranks(model: nn.Module) -> bool:
    """Whether ranks must make a model's forward passes together: FSDP's parameters, SyncBatchNorm's statistics."""
    together = (FullyShardedDataParallel, FSDPModule, nn.SyncBatchNorm)
    return dist.get_world_size() > 1 and any(isinstance(module, together) for module in model.modules())


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
