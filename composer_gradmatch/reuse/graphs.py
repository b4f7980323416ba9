"""The graphs of a forward and a backward pass, and the backward graph of picked samples that is made of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from composer_gradmatch.reuse.in_place import compute_in_place
from composer_gradmatch.reuse.inductor import InductorGraph
from composer_gradmatch.reuse.layout import Layout, Sizes, at
from composer_gradmatch.reuse.operators import (
    changes_something,
    depend_on,
    is_random,
    normalises_by_batch,
    operator_name,
)
from composer_gradmatch.reuse.probe import determine_layouts
from composer_gradmatch.reuse.slices import CompiledBackward, Slice, insert_slices
from composer_gradmatch.reuse.unsupported import UnsupportedError

__all__ = ["Graphs"]

#: The step whose gradients are verified again; the next are ten times as far apart.
FIRST_REVERIFICATION = 100


class Graphs:
    """A forward and a backward graph of AOTAutograd, and the backward graph of picked samples made of them.

    Args:
        forward (fx.GraphModule): Returns ``num_outputs`` outputs, the saved tensors, and the saved sizes.
        backward (fx.GraphModule): Takes the saved sizes, the saved tensors, and the gradients of the outputs; returns
            a gradient, or None, for each input of the forward graph.
        batch (sympy.Symbol): The number of samples.
        num_outputs (int): Outputs in all.
        num_mutated (int): How many of them, the first, are new contents of buffers.
        compiled (bool, optional): Whether to compile both. Default: ``False``.
    """

    def __init__(
        self,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        batch: sympy.Symbol,
        num_outputs: int,
        num_mutated: int,
        compiled: bool = False,
    ) -> None:
        self.forward, self.backward, self.batch = forward, backward, batch
        self._compiled = [InductorGraph(forward)] if compiled else []
        #: What runs the forward graph.
        self.run_forward: Callable[..., Any] = self._compiled[0] if compiled else compute_in_place(forward)
        self.num_outputs, self.num_mutated = num_outputs, num_mutated
        ends: Any = forward.graph.output_node().args[0]
        self.outputs: list[Any] = list(ends[num_mutated:num_outputs])
        self.buffers = {node for node in ends[:num_mutated] if isinstance(node, fx.Node)}
        saved = list(ends[num_outputs:])
        self.sizes = [node for node in saved if isinstance(node.meta["val"], torch.SymInt)]
        self.saved = saved[: len(saved) - len(self.sizes)]
        tangents = backward.graph.find_nodes(op="placeholder")[len(saved) :]
        #: How many outputs have gradients.
        self.num_tangents = len(tangents)
        reached = [depend_on(backward.graph.nodes, [tangent]) for tangent in tangents]
        gradients: Any = backward.graph.output_node().args[0]
        #: For each input of the forward graph, which of the outputs' gradients its own depends on.
        self.tangents_of = [{i for i, nodes in enumerate(reached) if gradient in nodes} for gradient in gradients]
        inputs = [node.meta["val"] for node in forward.graph.nodes if node.op == "placeholder"]
        self._others = {
            value.node.expr: i
            for i, value in enumerate(inputs)
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol and value.node.expr != batch
        }
        #: Whether the forward pass draws random numbers.
        self.random = any(node.op == "call_function" and is_random(node) for node in forward.graph.nodes)
        #: Whether batch normalisation mixes samples.
        self.normalises = any(
            node.op == "call_function" and normalises_by_batch(node, batch) for node in forward.graph.nodes
        )
        #: The steps that they have served, and the one whose gradients are to be verified next.
        self.steps, self.verified_at = 0, 1
        #: Which of the outputs that have gradients is the watched layer's.
        self.layer_output: int | None = None
        #: Runs the backward pass of some samples, once :meth:`prepare` has made it. It takes the saved sizes, the
        #: outputs' gradients, the saved tensors, the rows and the other sizes.
        self.sliced: Callable[..., Any] | None = None
        self.layouts: dict[fx.Node, Layout | None] | None = None

    def prepare(self, args: Sequence[Any]) -> None:
        """Determines the layouts on what the forward graph was called with, and makes the sliced backward graph.

        Raises:
            UndecidedError: If all samples are alike.
            UnsupportedError: If a layout cannot be told, samples are mixed, or the backward pass draws random numbers.
        """
        if self.sliced is not None:
            return
        if any(isinstance(node.meta["val"], torch.SymInt) for node in self.saved):
            raise UnsupportedError("the saved sizes do not come last")
        self.layouts = self._layouts_on(args)
        backward = self._without_dead_nodes()
        used = [bool(node.users) for node in backward.graph.find_nodes(op="placeholder")][len(self.sizes) :]
        slices = [Slice(i, self.layouts.get(node)) if used[i] else None for i, node in enumerate(self.saved)]
        if self._compiled:
            self._compiled.append(InductorGraph(backward))
            self.sliced = CompiledBackward(self._compiled[1], len(self.sizes), slices)
        else:
            self.sliced = insert_slices(backward, len(self.sizes), slices)

    def check_layouts(self, args: Sequence[Any]) -> None:
        """Determines the layouts once more, on other samples and parameters; takes them, where they differ.

        Raises:
            UndecidedError: If all samples are alike.
            UnsupportedError: If samples are mixed.
        """
        if self._layouts_on(args) != self.layouts:
            self.sliced = None
            del self._compiled[1:]
            self.prepare(args)
            self.verified_at = self.steps + 1

    def _layouts_on(self, args: Sequence[Any]) -> dict[fx.Node, Layout | None]:
        wanted = {*self.saved, *(node for node in self.outputs if isinstance(node, fx.Node))}
        # New running statistics, which batch_norm's backward takes and does not read, belong to no sample.
        wanted -= self.buffers
        return determine_layouts(self.forward, args, self.batch, wanted.__contains__, self.other_sizes(args))

    def _without_dead_nodes(self) -> fx.GraphModule:
        """The backward graph without what the partitioner leaves in it: what drew the forward pass's random numbers."""
        module = copy.deepcopy(self.backward)
        for node in reversed(list(module.graph.nodes)):
            if node.op == "call_function" and not node.users and not changes_something(node):
                module.graph.erase_node(node)
        for node in module.graph.nodes:
            if operator_name(node) == "aten::view":
                node.target = torch.reshape  # The picks' part of a tensor need not have its strides.
            if node.op == "call_function" and is_random(node):
                raise UnsupportedError(f"its backward pass draws random numbers ({node.target})")
        module.recompile()
        return module

    def postpone_verification(self) -> None:
        """Sets when gradients are to be verified next: at step 100, 1000, 10,000..."""
        self.verified_at = max(FIRST_REVERIFICATION, 10 * self.verified_at)

    def compile_failures(self) -> list[str]:
        """Tells why graphs that were to be compiled run uncompiled, as far as they have run."""
        return [graph.failure for graph in self._compiled if graph.failure is not None]

    def other_sizes(self, args: Sequence[Any]) -> Sizes:
        """Gives the sizes that vary, beside the number of samples, in what the forward graph was called with."""
        return tuple((symbol, int(args[i])) for symbol, i in self._others.items())

    def saved_sizes(self, num_samples: int, others: Sizes) -> list[int]:
        """Gives the saved sizes, for a number of samples."""
        return [at(node.meta["val"].node.expr, ((self.batch, num_samples), *others)) for node in self.sizes]
