"""Tells, on the CPU, of what would make the host wait for a GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
#: Whose result, or the size of whose result, the host must know.
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten._linalg_check_errors,
    aten.bincount,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}


class HostSyncError(AssertionError):
    """The host would wait for the device."""


class NoHostSync(TorchDispatchMode):
    """Raises where an operation would make the host wait for the device of its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet in WAITING:
            raise HostSyncError(f"{packet} asks the device for a value.")
        if packet in (aten.index, aten.index_put_, aten.index_put, aten._unsafe_index):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise HostSyncError("Indexing with a mask asks the device for the number of its elements.")
                if index is not None and index.device != args[0].device:
                    raise HostSyncError("Indexing with a tensor of another device copies it.")
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            raise HostSyncError("repeat_interleave without output_size asks the device for a sum.")
        device = (kwargs or {}).get("device")
        if packet is aten._to_copy and device not in (None, args[0].device) and not kwargs.get("non_blocking"):
            raise HostSyncError(f"A copy from {args[0].device} to {device} waits for it.")
        if packet is aten.copy_ and args[0].device != args[1].device:
            raise HostSyncError(f"A copy from {args[1].device} to {args[0].device} waits for it.")
        return func(*args, **(kwargs or {}))
