"""Finding the ``nn.Linear`` whose output a model returns, or that its user named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = [
    "NEEDS_NONE",
    "as_returned",
    "cannot_find",
    "find_output_layer",
    "name_of",
    "resolve_output_layer",
    "watch_linears",
]

#: What to do without an output layer, for error messages.
NEEDS_NONE = "Or use LossBackprop or RandomBackprop, which need no output layer."


def resolve_output_layer(model: nn.Module, output_layer: str | nn.Module) -> nn.Linear:
    """Finds the ``nn.Linear`` of a model that a dotted name or a module stands for.

    Args:
        model (nn.Module): The model.
        output_layer (str | nn.Module): A name as in ``model.named_modules()``, or one of the model's modules.

    Raises:
        ValueError: If the model has no such module, or it is no ``nn.Linear``; the candidates are listed.
    """
    modules = dict(model.named_modules())
    if isinstance(output_layer, str):
        layer, shown = modules.get(output_layer), f"output_layer={output_layer!r}"
    else:
        layer = next((module for module in modules.values() if module is output_layer), None)
        shown = f"output_layer, a {type(output_layer).__name__},"
    if layer is None:
        raise ValueError(f"{shown} is not a module of {type(model).__name__}. {_candidates(model)}")
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{shown} must be an nn.Linear, but it is a {type(layer).__name__}. {_candidates(model)}")
    return layer


def _candidates(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        return "The model has no nn.Linear at all; gradient matching needs a linear output layer."
    return f"Its nn.Linear layers are: {', '.join(names)}."


@contextmanager
def watch_linears(model: nn.Module) -> Iterator[list[tuple[nn.Linear, torch.Tensor]]]:
    """Lists each ``nn.Linear`` and what it put out, call by call, while the context is open."""
    calls: list[tuple[nn.Linear, torch.Tensor]] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        assert isinstance(module, nn.Linear)
        if isinstance(output, torch.Tensor):  # Which that of a subclass need not be.
            calls.append((module, output))

    handles = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def find_output_layer(
    model: nn.Module, calls: list[tuple[nn.Linear, torch.Tensor]], outputs: list[torch.Tensor]
) -> nn.Linear:
    """Finds the ``nn.Linear`` that produced a model's output in one forward pass.

    Args:
        model (nn.Module): The model, for the candidates' names in an error.
        calls (list): What :func:`watch_linears` recorded.
        outputs (list[torch.Tensor]): The tensors that the model returned.

    Returns:
        nn.Linear: The layer whose output *is* one of the tensors, or shares all of its memory (a reshape).

    Raises:
        ValueError: If no ``nn.Linear`` put out what the model returns, or more than one did.
    """
    found = as_returned(calls, outputs)
    if len(found) != 1:
        raise ValueError(cannot_find(model, len(found)))
    return found[0]


def as_returned(calls: list[tuple[nn.Linear, torch.Tensor]], outputs: list[torch.Tensor]) -> list[nn.Linear]:
    """Finds the layers whose output *is* one of the tensors, or shares all of its memory.

    Args:
        calls (list): What :func:`watch_linears` recorded.
        outputs (list[torch.Tensor]): The tensors that the model returned.
    """
    return list(
        {id(layer): layer for layer, output in calls if any(_same_memory(output, each) for each in outputs)}.values()
    )


def _same_memory(output: torch.Tensor, returned: torch.Tensor) -> bool:
    return output.numel() == returned.numel() and (
        output is returned or output.untyped_storage().data_ptr() == returned.untyped_storage().data_ptr()
    )


def cannot_find(model: nn.Module, number: int) -> str:
    """Says that no single output layer of a model was found.

    Args:
        model (nn.Module): The model.
        number (int): How many were.
    """
    what = "the outputs of more than one nn.Linear" if number else "the output of no nn.Linear"
    return (
        f"Cannot find the output layer of {type(model).__name__}: it returns {what}. {_candidates(model)} "
        "Pass the name of the one that the loss's gradients go through first as output_layer."
    )


def name_of(model: nn.Module, layer: nn.Module) -> str:
    """Finds a module's dotted name in a model, quoted.

    Args:
        model (nn.Module): The model.
        layer (nn.Module): One of its modules.
    """
    return next((repr(name) for name, module in model.named_modules() if module is layer), f"a {type(layer).__name__}")
