"""What a forward pass may change in a model besides its outputs, remembered and put back.

Buffers (BatchNorm's statistics, codebooks), parameters (momentum encoders, ``max_norm`` embeddings, normalised
weights), and what modules keep as attributes: numbers (a temperature that anneals by the number of calls), lists and
dicts (auxiliary losses that are gathered), tensors.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["ModelTraces", "ParameterContents"]

#: Attributes that are torch's own: what is in them is remembered otherwise, or is none of a forward pass's business.
_IN_ORDER = list(vars(nn.Module()))
_OWN_OF_TORCH = frozenset(_IN_ORDER)
_NUMBERS = frozenset({bool, int, float})
_CONTAINERS = frozenset({list, dict, set, deque})
#: What keeps its identity when its content changes.
_CHANGED_IN_PLACE = _CONTAINERS | {torch.Tensor}


class ModelTraces:
    """Remembers a model's buffers and its modules' attributes.

    Of attributes: numbers, lists, dicts, sets, and tensors without a graph; what comes into being later stays.

    Args:
        modules (Iterable[nn.Module]): All modules of the model: see :func:`.modules_of`.
        attributes (bool, optional): Whether to remember attributes, and which parameters there are, too.
            Default: ``True``.
        contents_of (Iterable[nn.Parameter], optional): Parameters whose contents to remember. Default: ``()``.
    """

    def __init__(
        self, modules: Iterable[nn.Module], attributes: bool = True, contents_of: Iterable[nn.Parameter] = ()
    ) -> None:
        self._contents = ParameterContents(contents_of)
        self._buffers: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []
        self._parameters: list[tuple[dict[str, Any], str, nn.Parameter, int, int]] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    content = (buffer.detach() if buffer.requires_grad else buffer).clone()
                    self._buffers.append((module._buffers, name, buffer, content))
            if not attributes:
                continue
            for name, each in module._parameters.items():
                if each is not None:
                    self._parameters.append((module._parameters, name, each, each._version, each.data_ptr()))
            held = vars(module)
            self._attributes.append((held, held.copy()))
            if _holds_only_what_is_replaced(held):
                continue
            for name, value in held.items():
                kind = type(value)
                if kind not in _CHANGED_IN_PLACE or name in _OWN_OF_TORCH:
                    continue
                if kind is not torch.Tensor:
                    self._containers.append((value, value.copy()))
                elif not value.requires_grad:
                    self._tensors.append((value, value.clone()))

    def changed_parameters(self) -> list[nn.Parameter]:
        """Finds the parameters that were changed in place, or by an assignment to ``data``, as told for nothing."""
        return [
            each
            for _, _, each, version, pointer in self._parameters
            if each._version != version or each.data_ptr() != pointer
        ]

    def changed(self) -> bool:
        """Tells whether a buffer or an attribute has changed since, or is another one."""
        same = (
            all(held.get(name) is value and _equal(value, content) for held, name, value, content in self._buffers)
            and all(_equal(value, content) for value, content in self._tensors)
            and all(map(_alike, *zip(*self._containers, strict=True)) if self._containers else ())
        )
        return not same or any(
            held.get(name) is not value
            for held, before in self._attributes
            for name, value in before.items()
            if name not in _OWN_OF_TORCH
        )

    def restore_buffers(self, only_changed: bool = False) -> None:
        """Puts buffers back, as often as it is called.

        Args:
            only_changed (bool, optional): Whether to leave those alone that have their content still, so that graphs
                that have saved them stay valid. Default: ``False``.
        """
        with torch.no_grad():
            # All of them: batch_norm changes its buffers without telling their version counters.
            for buffers, name, buffer, content in self._buffers:
                buffers[name] = buffer
                if not (only_changed and _equal(buffer, content)):
                    buffer.copy_(content)

    def restore(self, only_changed: bool = False) -> None:
        """Puts everything back, as often as it is called.

        Args:
            only_changed (bool, optional): As for :meth:`restore_buffers`. Default: ``False``.
        """
        self._contents.restore()
        self.restore_buffers(only_changed)
        with torch.no_grad():
            for tensor, content in self._tensors:
                if not (only_changed and _equal(tensor, content)):
                    tensor.copy_(content)
        for parameters, name, parameter, _, _ in self._parameters:
            if parameters.get(name) is not parameter:
                parameters[name] = parameter
        for held, before in self._attributes:
            if len(held) != len(before) or not all(map(operator.is_, held.values(), before.values())):
                _put_back(held, before)
        for container, content in self._containers:
            if not _alike(container, content):
                _refill(container, content)


def _holds_only_what_is_replaced(held: dict[str, Any]) -> bool:
    """Whether a module's attributes are seen at a glance to be numbers and the like, which never change in place."""
    first = len(_IN_ORDER)
    return [*held][:first] == _IN_ORDER and _CHANGED_IN_PLACE.isdisjoint(map(type, [*held.values()][first:]))


def _put_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        if held.get(name) is value:
            continue
        kind = type(value)
        number = kind in _NUMBERS and type(held.get(name)) in _NUMBERS
        plain = kind in _CONTAINERS or (kind is torch.Tensor and not value.requires_grad)
        if number or (plain and name not in _OWN_OF_TORCH):
            held[name] = value


def _alike(container: Any, content: Any) -> bool:
    return len(container) == len(content) and all(map(operator.is_, _items(container), _items(content)))


def _items(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, dict | set):
        container.update(content)
    else:
        container.extend(content)


class ParameterContents:
    """Remembers what is in parameters.

    Args:
        parameters (Iterable[nn.Parameter]): The parameters; of them, their contents and where those lie in memory.
        on_host (bool, optional): Whether to keep the contents in the host's memory. Default: ``False``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], on_host: bool = False) -> None:
        self._kept = [
            (each, each.data, each.detach().to("cpu", copy=True) if on_host else each.detach().clone())
            for each in parameters
        ]

    def changed(self) -> list[nn.Parameter]:
        """Finds the parameters that have another content now."""
        return [each for each, _, content in self._kept if not _equal(each.detach(), content.to(each.device))]

    def restore(self) -> None:
        """Puts the contents back, without telling the version counters: graphs that saved a parameter stay valid."""
        for parameter, data, content in self._kept:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            data.copy_(content)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
