"""Computing in place what AOTAutograd, whose graphs are functional, has taken out of place."""

from __future__ import annotations

import operator

import torch
from torch import fx

from composer_gradmatch.reuse.operators import operator_name

__all__ = ["compute_in_place"]

#: Operators whose first result is a tensor of its own.
_FRESH = {
    "aten::convolution",
    "aten::native_group_norm",
    "aten::native_layer_norm",
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit_functional",
    "aten::_batch_norm_with_update_functional",
    "aten::cudnn_batch_norm",
    "aten::addmm",
    "aten::mm",
    "aten::add.Tensor",
}


def compute_in_place(forward: fx.GraphModule) -> fx.GraphModule:
    """Gives a copy of a functional graph in which ReLUs and sums overwrite what nothing else reads.

    Args:
        forward (fx.GraphModule): The graph, with ``val`` in each node's meta.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(forward.graph, {}))
    overwritten = [(node, found) for node in graph.nodes if (found := _overwritten(node)) is not None]
    for node, argument in overwritten:
        if operator_name(node) == "aten::relu":
            node.target = torch.relu_
        else:
            node.target = torch.Tensor.add_
            place = node.args.index(argument)
            node.args = (argument, *node.args[:place], *node.args[place + 1 :])
    return fx.GraphModule(forward, graph)


def _overwritten(node: fx.Node) -> fx.Node | None:
    """Gives the argument whose place a node's result may take."""
    if operator_name(node) not in ("aten::relu", "aten::add.Tensor") or node.kwargs:
        return None
    value: torch.Tensor = node.meta["val"]

    def may_be(argument: fx.Node) -> bool:
        if len(argument.users) != 1:
            return False
        source = argument.args[0] if argument.target is operator.getitem and argument.args[1] == 0 else argument
        own = argument.meta["val"]
        return (
            isinstance(source, fx.Node)
            and operator_name(source) in _FRESH
            and own.shape == value.shape
            and own.dtype == value.dtype
        )

    return next((argument for argument in node.all_input_nodes if may_be(argument)), None)
