"""Finding the layer whose output a model returns, or that its user named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from composer_gradmatch.batches import copy_structure
from composer_gradmatch.last_layer.find_products import watch_products
from composer_gradmatch.last_layer.layers import (
    LinearLayer,
    OutputLayer,
    PointwiseConvolution,
    convolution_fault,
    is_pointwise,
)

__all__ = [
    "NEEDS_NONE",
    "as_convolution",
    "as_linear",
    "as_returned",
    "candidates",
    "cannot_find",
    "check_named",
    "name_of",
    "resolve_output_layer",
    "watch_modules",
]

#: Layers, what they put out, and the node of the graph that this came from, in the order of the calls.
Calls = list[tuple[OutputLayer, torch.Tensor, Any]]

#: What to do without an output layer, for error messages.
NEEDS_NONE = "Or use LossBackprop or RandomBackprop, which need no output layer."


def resolve_output_layer(model: nn.Module, output_layer: str | nn.Module, batch: Any = None) -> OutputLayer:
    """Finds the layer of a model that a dotted name or a module stands for.

    Args:
        model (nn.Module): The model.
        output_layer (str | nn.Module): A name as in ``model.named_modules()``, or one of the model's modules: an
            ``nn.Linear``, a convolution with a kernel of one element, or what has the weight of a matrix product. Also
            the name of that weight, as in ``model.named_parameters()``.
        batch (Any, optional): What the model takes; a product is found by a forward pass. Default: ``None``.

    Raises:
        ValueError: If the model has no such module, it is none of these, or its weight is in no product, or in several;
            the candidates are listed.
    """
    module, parameter = check_named(model, output_layer)
    if isinstance(module, nn.Linear) and parameter in (None, "weight"):
        return LinearLayer(module)
    if is_pointwise(module) and parameter in (None, "weight"):
        return PointwiseConvolution(module)
    shown = _shown(output_layer)
    if batch is None:
        raise ValueError(f"{shown} is {_a(module)}, whose matrix product is found by a forward pass only.")
    with torch.no_grad(), watch_products(model) as calls:
        model(copy_structure(batch))
    found = {each for each, _, _ in calls if each.is_of(module, parameter)}
    # With its bias, where one is added.
    layers = [each for each in found if not any(each.is_part_of(other) for other in found)]
    if len(layers) == 1:
        return layers[0]
    how_often = f"{len(layers)} different matrix products" if layers else "no matrix product"
    raise ValueError(
        f"{shown} is {_a(module)}, of whose weight, as it is, {how_often} of a forward pass was found (F.linear, @, "
        f"torch.matmul, mm, addmm, einsum); expected one. A weight that is computed (normalised, scaled, a part of a "
        f"parameter) is none. {candidates(model)} {NEEDS_NONE}"
    )


def check_named(model: nn.Module, output_layer: str | nn.Module) -> tuple[nn.Module, str | None]:
    """Finds the module that a dotted name or a module stands for, and the parameter, if it is one's name.

    Args:
        model (nn.Module): The model.
        output_layer (str | nn.Module): See :func:`resolve_output_layer`.

    Raises:
        ValueError: If there is none, or it can be no output layer, whatever the batch; the candidates are listed.
    """
    modules = dict(model.named_modules())
    parameter = None
    if isinstance(output_layer, str):
        module = modules.get(output_layer)
        if module is None:
            prefix, _, name = output_layer.rpartition(".")
            holder = modules.get(prefix)
            if holder is not None and isinstance(holder._parameters.get(name), nn.Parameter):
                module, parameter = holder, name
    else:
        module = next((module for module in modules.values() if module is output_layer), None)
    shown = _shown(output_layer)
    if module is None:
        raise ValueError(f"{shown} is not a module of {type(model).__name__}. {candidates(model)}")
    if isinstance(module, nn.Linear) or is_pointwise(module):
        return module, parameter
    own = [parameter] if parameter is not None else list(module._parameters)
    if not any(each is not None and each.dim() == 2 for each in map(module._parameters.get, own)):
        fault = convolution_fault(module)
        raise ValueError(
            f"{shown} must be an nn.Linear, a convolution with a kernel of one element (without stride, padding and "
            f"groups), or what has the weight of a matrix product, but it is {_a(module)}"
            f"{'' if fault is None else f' ({fault})'}. {candidates(model)}"
        )
    return module, parameter


def _shown(output_layer: str | nn.Module) -> str:
    if isinstance(output_layer, str):
        return f"output_layer={output_layer!r}"
    return f"output_layer, {_a(output_layer)},"


def _a(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def candidates(model: nn.Module) -> str:
    """Lists a model's layers that can be output layers.

    Args:
        model (nn.Module): The model.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    convolutions = [name for name, module in model.named_modules() if is_pointwise(module)]
    if not linears and not convolutions:
        return "The model has no nn.Linear at all; gradient matching needs a linear output layer."
    found = [f"Its nn.Linear layers are: {', '.join(linears)}."] if linears else []
    if convolutions:
        found.append(f"Its convolutions with a kernel of one element are: {', '.join(convolutions)}.")
    return " ".join(found)


@contextmanager
def watch_modules(model: nn.Module, makes: Callable[[nn.Module], OutputLayer | None]) -> Iterator[Calls]:
    """Lists each module that is a layer, and what it put out, call by call, while the context is open.

    Args:
        model (nn.Module): The model.
        makes (Callable): Makes a layer of a module; None if it is none.
    """
    calls: Calls = []
    handles = []
    for module in model.modules():
        layer = makes(module)
        if layer is not None:

            def record(_: nn.Module, args: Any, output: Any, layer: OutputLayer = layer) -> None:
                if isinstance(output, torch.Tensor):  # Which that of a subclass need not be.
                    calls.append((layer, output, output.grad_fn))

            handles.append(module.register_forward_hook(record))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def as_linear(module: nn.Module) -> OutputLayer | None:
    """Makes a layer of an ``nn.Linear``."""
    return LinearLayer(module) if isinstance(module, nn.Linear) else None


def as_convolution(module: nn.Module) -> OutputLayer | None:
    """Makes a layer of a convolution with a kernel of one element."""
    return PointwiseConvolution(module) if is_pointwise(module) else None


def as_returned(calls: Calls, outputs: list[torch.Tensor]) -> list[OutputLayer]:
    """Finds the layers whose output *is* one of the tensors, or shares all of its memory (a reshape).

    Args:
        calls (list): What :func:`watch_modules` recorded.
        outputs (list[torch.Tensor]): The tensors that the model returned.
    """
    return list(
        dict.fromkeys(layer for layer, output, _ in calls if any(_same_memory(output, each) for each in outputs))
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
    what = "the outputs of more than one linear layer" if number else "the output of no nn.Linear"
    return (
        f"Cannot find the output layer of {type(model).__name__}: it returns {what}. {candidates(model)} "
        "Pass the name of the one that the loss's gradients go through first as output_layer."
    )


def name_of(model: nn.Module, layer: OutputLayer) -> str:
    """Finds a layer's dotted name in a model, quoted.

    Args:
        model (nn.Module): The model.
        layer (OutputLayer): One of its layers.
    """
    name = layer.name_in(model)
    return layer.kind if name is None else repr(name)
