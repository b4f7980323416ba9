"""What a model is at one moment, so far as it can be told again for next to nothing."""

from __future__ import annotations

import operator
from array import array
from typing import Any

import torch
from torch import nn

__all__ = ["ModelState"]

#: Types of tensors that have one place in memory.
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


class ModelState:
    """The modules of a model, their parameters, buffers, flags and hooks, to be compared with a later moment.

    Compared are identities, version counters, places in memory and ``requires_grad`` of parameters and buffers, the
    training flags, and the hooks. Of what lies on the CPU also one number of each floating-point tensor, since
    ``tensor.data.mul_(...)`` counts no version; on another device that would make the host wait.

    Args:
        model (nn.Module): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Whatever is compared by its id is kept, or another could have it.
        self._modules, self._tensors, self._flags, self._hooks = _parts(model)
        self._all_plain = all(map(_is_plain, self._tensors))
        self._marks = self._marks_of(self._tensors)
        self._probed = [
            tensor
            for tensor in self._tensors
            if _is_plain(tensor) and tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.numel()
        ]
        self._probes = [tensor.detach().as_strided((1,), (1,)) for tensor in self._probed]
        self._numbers = self._read()

    def renew(self) -> ModelState:
        """Gives the state now, which costs less where modules and tensors are those of this one."""
        modules, tensors, flags, hooks = _parts(self._model)
        if not (_same(modules, self._modules) and _same(tensors, self._tensors)):
            return ModelState(self._model)
        marks = self._marks_of(tensors)
        if any(new[1] != old[1] for new, old in zip(marks, self._marks, strict=True)):
            return ModelState(self._model)
        self._marks, self._flags, self._hooks, self._numbers = marks, flags, hooks, self._read()
        return self

    def change(self) -> str | None:
        """Tells what has changed since, in words; None for nothing."""
        modules, tensors, flags, hooks = _parts(self._model)
        if not _same(modules, self._modules):
            return "a module was replaced"
        if not _same(tensors, self._tensors):
            return "a parameter or a buffer was replaced"
        if flags != self._flags:
            return "a training flag was changed"
        if hooks != self._hooks:
            return "hooks were added to its layers, or removed"
        if self._marks_of(tensors) != self._marks or self._read() != self._numbers:
            return "a parameter or a buffer was changed, or a layer frozen or unfrozen"
        return None

    def as_they_were(self) -> set[int]:
        """Gives the ids of the parameters and buffers that are the model's still and show no change."""
        now, then = self._read(), self._numbers
        other = {id(self._probed[i]) for i in range(len(self._probed)) if now[8 * i :][:8] != then[8 * i :][:8]}
        marks = zip(self._tensors, self._marks_of(self._tensors), self._marks, strict=True)
        unmarked = {id(tensor) for tensor, new, old in marks if new == old}
        return (unmarked - other) & {id(tensor) for tensor in _parts(self._model)[1]}

    def _marks_of(self, tensors: list[torch.Tensor]) -> list[tuple[int, int, bool]]:
        if self._all_plain:
            return [(tensor._version, tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
        places = [tensor.data_ptr() if _is_plain(tensor) else 0 for tensor in tensors]
        return [(tensor._version, place, tensor.requires_grad) for tensor, place in zip(tensors, places, strict=True)]

    def _read(self) -> bytes:
        # As bytes, in which what is not a number equals itself.
        return array("d", torch.cat(self._probes).tolist()).tobytes() if self._probes else b""


def _parts(model: nn.Module) -> tuple[list[nn.Module], list[torch.Tensor], list[bool], list[int]]:
    """Gives the modules, their parameters and buffers, their training flags, and the ids of hooks.

    Hooks are those of submodules, which only a forward pass of the model's own calls.
    """
    modules: list[nn.Module] = [model]
    tensors: list[torch.Tensor] = []
    flags: list[bool] = []
    hooks: list[int] = []
    seen = {id(model)}
    for module in modules:
        held = module.__dict__
        flags.append(held["training"])
        for group in (held["_parameters"], held["_buffers"]):
            if group:
                tensors += [tensor for tensor in group.values() if tensor is not None]
        for child in held["_modules"].values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
        if module is not model and (
            held["_forward_pre_hooks"]
            or held["_forward_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
        ):
            for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
                hooks += held[name]
    return modules, tensors, flags, hooks


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout == torch.strided
