"""What the nodes of a graph of AOTAutograd are: their operators, and what depends on what."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from composer_gradmatch.forward.torch_private import OpOverload
from composer_gradmatch.reuse.layout import possible_layouts

__all__ = [
    "argument_of",
    "changes_something",
    "depend_on",
    "is_random",
    "needed_by",
    "normalises_by_batch",
    "operator_name",
]


def _operator(node: fx.Node) -> Any:
    """Gives the operator that a node calls; None where it calls none."""
    return node.target if isinstance(node.target, OpOverload) else None


def operator_name(node: fx.Node) -> str:
    """Gives the full name of the operator that a node calls; empty where it calls none."""
    called = _operator(node)
    return "" if called is None else called.name()


def argument_of(node: fx.Node, name: str) -> Any:
    """Tells what an operator is called with, or its default; None where it takes nothing of that name."""
    for i, argument in enumerate(_operator(node)._schema.arguments):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, argument.default_value)
    return None


def is_random(node: fx.Node) -> bool:
    """Tells whether a node draws random numbers; attention without dropout, tagged so, does not."""
    called = _operator(node)
    if called is None or torch.Tag.nondeterministic_seeded not in called.tags:
        return False
    return bool(argument_of(node, "dropout_p") != 0)


def changes_something(node: fx.Node) -> bool:
    """Tells whether calling a node may do more than return a result."""
    called = _operator(node)
    return node.target is not operator.getitem if called is None else called._schema.is_mutable


def normalises_by_batch(node: fx.Node, batch: sympy.Symbol) -> bool:
    """Tells whether a node is batch normalisation in training; that of instances has statistics of each sample."""
    name = operator_name(node)
    if "batch_norm" not in name or any(evaluation in name for evaluation in ("no_training", "no_update")):
        return False
    return argument_of(node, "training") is not False and not possible_layouts(node.meta["val"][1], batch)


def depend_on(nodes: Iterable[fx.Node], sources: Iterable[fx.Node]) -> set[fx.Node]:
    """Gives the nodes, of a graph in its order, that depend on any source."""
    found = set(sources)
    for node in nodes:
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def needed_by(nodes: Iterable[fx.Node], ends: Iterable[fx.Node]) -> set[fx.Node]:
    """Gives the nodes, of a graph in its order, that any end depends on, and the ends."""
    found = set(ends)
    for node in reversed(list(nodes)):
        if node in found:
            found.update(node.all_input_nodes)
    return found
