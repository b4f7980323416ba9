"""Which parameters a tensor was made with, by its autograd graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["graph_nodes", "graph_parameters", "learned_behind"]


def graph_nodes(tensor: torch.Tensor, stop: Collection[Any] = ()) -> Iterator[Any]:
    """Walks the nodes of a tensor's graph, the nearest first, down to those to stop at."""
    waiting = deque([tensor.grad_fn])
    seen = {tensor.grad_fn}
    while waiting:
        node = waiting.popleft()
        if node is None:
            continue
        yield node
        if node in stop:
            continue
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def graph_parameters(tensor: torch.Tensor, stop: Collection[Any] = ()) -> Iterator[nn.Parameter]:
    """Walks the parameters in a tensor's graph, the nearest first, down to the nodes to stop at."""
    for node in graph_nodes(tensor, stop):
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            yield variable


def learned_behind(losses: torch.Tensor, leaf: torch.Tensor, model: nn.Module) -> list[str]:
    """Finds the parameters that the losses' gradients at a layer's output are made with: those behind it.

    A term of the losses that does not depend on the output (a penalty on weights) is not behind it.

    Args:
        losses (torch.Tensor): The samples' losses, with their graph from ``leaf``, where it was cut; it is kept.
        leaf (torch.Tensor): The layer's output.
        model (nn.Module): The model, for the parameters' names.

    Returns:
        list[str]: Their names, or shapes where they are none of the model's.
    """
    found = list(graph_parameters(losses))
    if not found:
        return []
    try:
        (grads,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True, allow_unused=True)
    except RuntimeError:
        grads = None  # An operation without second derivatives, which are not wanted: all that is found counts, then.
    # A function written in Python can hide what its gradients are made with, if it can be differentiated only once.
    opaque = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in graph_nodes(losses))
    if grads is not None and not opaque:
        made_with = {id(parameter) for parameter in graph_parameters(grads)}
        found = [parameter for parameter in found if id(parameter) in made_with]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        names.get(id(parameter), f"one of shape {tuple(parameter.shape)} that is not the model's")
        for parameter in found
    ]
