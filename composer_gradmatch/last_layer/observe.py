"""Finding an output layer by a forward pass: the one that what a model returns is made from by nothing learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from composer_gradmatch.batches import copy_structure, tensor_leaves
from composer_gradmatch.last_layer.find import NEEDS_NONE, as_returned, cannot_find, watch_linears
from composer_gradmatch.last_layer.graph import graph_nodes, graph_parameters

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
def observe_output_layer(model: nn.Module, batch: Any) -> nn.Linear:
    """Finds the linear layer that puts out what a model returns, or what it is made from by nothing learned.

    A layer's output that is returned as it is is found by one forward pass. Where what is returned is a part of an
    output, or another function of it without parameters, the graph of a second pass shows which.

    Args:
        model (nn.Module): Called on the batch; wrap in :func:`.no_trace` to leave its buffers alone.
        batch (Any): What the model takes.

    Raises:
        ValueError: If there is no such layer, or more than one.
    """
    with watch_linears(model) as calls:
        returned = returned_tensors(model(copy_structure(batch)))
    found = as_returned(calls, returned)
    applied = None
    if not found:
        with torch.enable_grad(), _watch_nodes(model) as nodes:
            returned = returned_tensors(model(copy_structure(batch)))
        found = [layer for layer, _ in nodes if _is_made_from(returned, layer, nodes)]
        if not found:
            applied = _applied_without_linear(model, returned, {node for _, node in nodes})
    if len(found) == 1:
        return found[0]
    raise ValueError(cannot_find(model, len(found)) if applied is None else applied)


@contextmanager
def _watch_nodes(model: nn.Module) -> Iterator[list[tuple[nn.Linear, Any]]]:
    """Lists each ``nn.Linear`` and the node of the graph that its output comes from, before anything changes it."""
    nodes: list[tuple[nn.Linear, Any]] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        assert isinstance(module, nn.Linear)
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            nodes.append((module, output.grad_fn))

    handles = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield nodes
    finally:
        for handle in handles:
            handle.remove()


def _is_made_from(returned: list[torch.Tensor], layer: nn.Linear, nodes: list[tuple[nn.Linear, Any]]) -> bool:
    """Whether tensors of a layer's width depend on its only output, and on nothing learned behind or beside it."""
    own = {node for called, node in nodes if called is layer}
    made = [each for each in returned if each.dim() and layer.out_features in (1, each.shape[-1])]
    made = [each for each in made if own & set(graph_nodes(each))]
    return len(own) == 1 and bool(made) and not any(True for each in made for _ in graph_parameters(each, own))


def _applied_without_linear(model: nn.Module, returned: list[torch.Tensor], linears: set[Any]) -> str | None:
    """Tells what to say of the parameter that tensors were made with last; None if an ``nn.Linear`` has it."""
    behind = [parameter for tensor in returned for parameter in graph_parameters(tensor, linears)]
    # Rather the matrix of a head than the scale of a norm before it, which is as near.
    last = next((parameter for parameter in behind if parameter.dim() > 1), behind[0] if behind else None)
    owners = {
        f"{prefix}.{name}".removeprefix("."): module
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter is last
    }
    if last is None or not owners or any(isinstance(owner, nn.Linear) for owner in owners.values()):
        return None
    names = " = ".join(f"{name} (of {type(owner).__name__})" for name, owner in owners.items())
    if last.dim() != 2:
        return f"{cannot_find(model, 0)} Behind their outputs, what it returns is made with the parameter {names}."
    return (
        f"Cannot find the output layer of {type(model).__name__}: what it returns is made with the parameter {names}, "
        "which no nn.Linear of the model holds (a tied head is often F.linear(x, embedding.weight)), and gradient "
        "matching needs this product to be an nn.Linear's. Give the model head = nn.Linear(..., bias=False) with "
        "head.weight = that parameter, and return head(x), which are the same numbers; the gradients of any other "
        f"layer are not those of the head. {NEEDS_NONE}"
    )
