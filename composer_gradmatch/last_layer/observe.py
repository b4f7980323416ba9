"""Finding an output layer by a forward pass: the one that what a model returns is made from by nothing learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from composer_gradmatch.batches import copy_structure, tensor_leaves
from composer_gradmatch.last_layer.find import (
    NEEDS_NONE,
    Calls,
    as_convolution,
    as_linear,
    as_returned,
    cannot_find,
    watch_modules,
)
from composer_gradmatch.last_layer.find_products import watch_products
from composer_gradmatch.last_layer.graph import graph_nodes, graph_parameters
from composer_gradmatch.last_layer.layers import OutputLayer, convolution_fault

__all__ = ["observe_output_layer", "returned_tensors"]


def returned_tensors(outputs: Any) -> list[torch.Tensor]:
    """Finds the tensors of a model's outputs that the output layer is to be looked for in.

    Args:
        outputs (Any): What the model returned. Of a mapping with ``logits``, or a tuple of a scalar loss and logits,
            as HuggingFace's models return it without ``return_dict``, the logits; all tensors otherwise.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if isinstance(outputs, tuple) and len(outputs) > 1 and isinstance(outputs[0], torch.Tensor):
        logits = outputs[1] if outputs[0].dim() == 0 else None
    if isinstance(logits, torch.Tensor) and logits.dim() > 0:
        return [logits]
    return list(tensor_leaves(outputs))


@torch.no_grad()
def observe_output_layer(model: nn.Module, batch: Any) -> OutputLayer:
    """Finds the linear layer that puts out what a model returns, or what it is made from by nothing learned.

    An ``nn.Linear``'s output that is returned as it is is found by one forward pass. Where what is returned is a part
    of an output, or another function of it without parameters, the graph of a second pass shows which. Where that is
    no ``nn.Linear``'s, a third one looks at convolutions with a kernel of one element and at matrix products.

    Args:
        model (nn.Module): Called on the batch; wrap in :func:`.no_trace` to leave its buffers alone.
        batch (Any): What the model takes.

    Raises:
        ValueError: If there is no such layer, or more than one.
    """
    with watch_modules(model, as_linear) as calls:
        returned = returned_tensors(model(copy_structure(batch)))
    found = as_returned(calls, returned)
    if not found:
        with torch.enable_grad(), watch_modules(model, as_linear) as calls:
            returned = returned_tensors(model(copy_structure(batch)))
        found = _made_from(returned, calls)
    if not found:
        with (
            torch.enable_grad(),
            watch_modules(model, as_linear) as linears,
            watch_modules(model, as_convolution) as calls,
            watch_products(model) as products,
        ):
            returned = returned_tensors(model(copy_structure(batch)))
        calls += products
        found = as_returned(calls, returned) or _made_from(returned, calls)
        if not found:
            raise ValueError(_why_not(model, returned, {node for _, _, node in [*linears, *calls]}))
    if len(found) != 1:
        raise ValueError(cannot_find(model, len(found)))
    return found[0]


def _made_from(returned: list[torch.Tensor], calls: Calls) -> list[OutputLayer]:
    """Lists the layers of whose only output tensors are made, and of nothing learned behind or beside it."""
    nodes: dict[OutputLayer, set[Any]] = {}
    for layer, _, node in calls:
        if node is not None:
            nodes.setdefault(layer, set()).add(node)
    return [layer for layer, own in nodes.items() if len(own) == 1 and _is_made_from(returned, layer, own)]


def _is_made_from(returned: list[torch.Tensor], layer: OutputLayer, own: set[Any]) -> bool:
    made = [each for each in returned if layer.makes(each.shape) and own & set(graph_nodes(each))]
    return bool(made) and not any(True for each in made for _ in graph_parameters(each, own))


def _why_not(model: nn.Module, returned: list[torch.Tensor], known: set[Any]) -> str:
    """Tells what to say of the parameter that tensors were made with last, by none of the layers that are known."""
    behind = [parameter for tensor in returned for parameter in graph_parameters(tensor, known)]
    # Rather the matrix of a head than the scale of a norm before it, which is as near.
    last = next((parameter for parameter in behind if parameter.dim() > 1), behind[0] if behind else None)
    owners = {
        f"{prefix}.{name}".removeprefix("."): module
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter is last
    }
    if last is None or not owners or any(isinstance(owner, nn.Linear) for owner in owners.values()):
        return cannot_find(model, 0)
    names = " = ".join(f"{name} (of {type(owner).__name__})" for name, owner in owners.items())
    faults = [fault for fault in map(convolution_fault, owners.values()) if fault is not None]
    if last.dim() > 2 and faults:
        return (
            f"Cannot find the output layer of {type(model).__name__}: what it returns is made with the parameter "
            f"{names}, but {faults[0]}; a convolution is a linear layer at each position only with a kernel of one "
            "element, a stride of one, no padding and one group. Put such a one (or an nn.Linear) behind it, or name "
            f"another layer as output_layer, whose gradient is then matched. {NEEDS_NONE}"
        )
    if last.dim() != 2:
        return f"{cannot_find(model, 0)} Behind their outputs, what it returns is made with the parameter {names}."
    return (
        f"Cannot find the output layer of {type(model).__name__}: what it returns is made with the parameter {names}, "
        "but not by a matrix product of rows with it as it is (F.linear, @, torch.matmul, mm, addmm or einsum; its "
        "weight may be computed: normalised, scaled, a part of a parameter). Normalise and scale before or behind the "
        f"product, or give the model an nn.Linear as its head. {NEEDS_NONE}"
    )
