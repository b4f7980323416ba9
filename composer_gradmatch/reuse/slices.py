"""Taking the picks' part of what a forward pass over all samples has saved, on the way of a backward graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from composer_gradmatch.reuse.inductor import InductorGraph
from composer_gradmatch.reuse.layout import Layout, Sizes

__all__ = ["CompiledBackward", "Saved", "Slice", "insert_slices"]


@dataclass
class Saved:
    """Saved tensors, which are let go of one by one as they are taken for the last time."""

    tensors: list[torch.Tensor | None]
    last: bool


@dataclass(frozen=True)
class Slice:
    """Takes the picks' part of a saved tensor."""

    index: int
    layout: Layout | None

    def take(self, saved: Saved, rows: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Gives the part of the samples ``rows``, int64, shape (m,), at the other ``sizes`` that vary."""
        tensor = saved.tensors[self.index]
        assert tensor is not None
        if saved.last:
            saved.tensors[self.index] = None
        return tensor if self.layout is None else self.layout.take(tensor, rows, sizes)


def insert_slices(module: fx.GraphModule, num_sizes: int, slices: Sequence[Slice | None]) -> fx.GraphModule:
    """Slices each saved tensor just before a backward graph first uses it."""
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_before(placeholders[-1].next):
        saved, rows, sizes = map(graph.placeholder, ("saved", "picked_rows", "other_sizes"))
    for node, each in zip(placeholders[num_sizes : num_sizes + len(slices)], slices, strict=True):
        if each is not None:
            with graph.inserting_before(min(node.users, key=order.__getitem__)):
                taken = graph.call_function(each.take, (saved, rows, sizes))
            node.replace_all_uses_with(taken)
        graph.erase_node(node)
    graph.lint()
    module.recompile()
    return module


class CompiledBackward:
    """Slices all saved tensors, and then runs the compiled backward graph."""

    def __init__(self, graph: InductorGraph, num_sizes: int, slices: Sequence[Slice | None]) -> None:
        self._graph, self._num_sizes, self._slices = graph, num_sizes, slices

    def __call__(self, *args: Any) -> Any:
        """Gives the gradients, for what :attr:`.Graphs.sliced` takes."""
        *given, saved, rows, others = args
        sizes, tangents = given[: self._num_sizes], given[self._num_sizes :]
        taken = [None if each is None else each.take(saved, rows, others) for each in self._slices]
        return self._graph(*sizes, *taken, *tangents)
