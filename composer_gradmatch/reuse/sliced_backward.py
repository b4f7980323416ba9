"""The backward pass of some samples, from what a forward pass over all of them has saved."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import sympy
import torch
from torch import fx
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.autograd.function import once_differentiable

from composer_gradmatch.reuse.in_place import compute_in_place
from composer_gradmatch.reuse.inductor import InductorGraph
from composer_gradmatch.reuse.layout import (
    Layout,
    Sizes,
    at,
    depend_on,
    determine_layouts,
    is_random,
    normalises_by_batch,
    operator_name,
)
from composer_gradmatch.reuse.unsupported import UnsupportedError

__all__ = ["Graphs", "Run"]

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
        slices = [_Slice(i, self.layouts.get(node)) if used[i] else None for i, node in enumerate(self.saved)]
        if self._compiled:
            self._compiled.append(InductorGraph(backward))
            self.sliced = _CompiledBackward(self._compiled[1], len(self.sizes), slices)
        else:
            self.sliced = _insert_slices(backward, len(self.sizes), slices)

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
            if node.op == "call_function" and not node.users and not _changes_something(node):
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
        """Why graphs that were to be compiled run uncompiled, as far as they have run."""
        return [graph.failure for graph in self._compiled if graph.failure is not None]

    def other_sizes(self, args: Sequence[Any]) -> Sizes:
        """The sizes that vary, beside the number of samples, in what the forward graph was called with."""
        return tuple((symbol, int(args[i])) for symbol, i in self._others.items())

    def saved_sizes(self, num_samples: int, others: Sizes) -> list[int]:
        """The saved sizes, for a number of samples."""
        return [at(node.meta["val"].node.expr, ((self.batch, num_samples), *others)) for node in self.sizes]


@dataclass
class _Saved:
    """Saved tensors, which are let go of one by one as they are taken for the last time."""

    tensors: list[torch.Tensor | None]
    last: bool


@dataclass(frozen=True)
class _Slice:
    """Takes the picks' part of a saved tensor."""

    index: int
    layout: Layout | None

    def take(self, saved: _Saved, rows: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        tensor = saved.tensors[self.index]
        assert tensor is not None
        if saved.last:
            saved.tensors[self.index] = None
        return tensor if self.layout is None else self.layout.take(tensor, rows, sizes)


def _insert_slices(module: fx.GraphModule, num_sizes: int, slices: Sequence[_Slice | None]) -> fx.GraphModule:
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


class _CompiledBackward:
    """Slices all saved tensors, and then runs the compiled backward graph."""

    def __init__(self, graph: InductorGraph, num_sizes: int, slices: Sequence[_Slice | None]) -> None:
        self._graph, self._num_sizes, self._slices = graph, num_sizes, slices

    def __call__(self, *args: Any) -> Any:
        *given, saved, rows, others = args
        sizes, tangents = given[: self._num_sizes], given[self._num_sizes :]
        taken = [None if each is None else each.take(saved, rows, others) for each in self._slices]
        return self._graph(*sizes, *taken, *tangents)


def _changes_something(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.target is not operator.getitem and (schema is None or schema.is_mutable)


class Run:
    """What one forward pass has saved.

    Args:
        graphs (Graphs): The graphs.
        args (list[Any]): What the forward graph was called with.
        results (list[Any]): What it returned: outputs, saved tensors, saved sizes.
    """

    def __init__(self, graphs: Graphs, args: list[Any], results: list[Any]) -> None:
        self.graphs = graphs
        self._args, self._sizes = args, graphs.other_sizes(args)
        # Autograd is about to put its own graph behind the outputs, which would keep what was saved.
        self._all_outputs = [
            out.detach() if isinstance(out, torch.Tensor) else out
            for out in results[graphs.num_mutated : graphs.num_outputs]
        ]
        self.saved: list[Any] = results[graphs.num_outputs : graphs.num_outputs + len(graphs.saved)]
        self.parameters = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
        self._places = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.requires_grad]
        self.versions = [parameter._version for parameter in self.parameters]
        #: What the model returned: its tensors, without a graph.
        self.outputs: list[torch.Tensor] = []
        self._differentiable: list[int] = []
        #: Whether the saved tensors are gone.
        self.spent = False
        #: How many picks there are, if that is known.
        self.num_picks: int | None = None
        self._over: set[int] = set()
        #: What autograd holds of the picks' graphs whose backward pass may be to come.
        self.open: WeakSet[Any] = WeakSet()

    def name_outputs(self, positions: list[int], with_gradient: list[int]) -> None:
        """Says which outputs of the graph are the model's, and prepares the sliced backward graph.

        Args:
            positions (list[int]): The model's outputs, in its order, as positions among the graph's.
            with_gradient (list[int]): Those of the graph's outputs that have a gradient.

        Raises:
            UnsupportedError: If an output has no row for each sample, or the graphs cannot be sliced.
        """
        graphs = self.graphs
        for position in positions:
            shape = tuple(graphs.outputs[position].meta["val"].shape)
            if not shape or not isinstance(shape[0], torch.SymInt) or shape[0].node.expr != graphs.batch:
                raise UnsupportedError(f"it returns a tensor of shape {shape} that has no row for each sample")
        graphs.prepare(self._args)
        self.outputs = [self._all_outputs[position] for position in positions]
        if len(with_gradient) != graphs.num_tangents or not set(with_gradient) <= set(positions):
            raise UnsupportedError("its outputs' gradients cannot be told apart")
        #: For each gradient that the backward graph takes: which of the model's outputs it is of.
        self._differentiable = [positions.index(i) for i in with_gradient]

    def check_layouts(self) -> None:
        """See :meth:`.Graphs.check_layouts`; only before :meth:`let_go_of_inputs`."""
        self.graphs.check_layouts(self._args)

    def let_go_of_inputs(self) -> None:
        """Lets go of what the forward graph was called with."""
        self._args = []

    def tensors(self) -> list[torch.Tensor]:
        """The outputs and the saved tensors."""
        return [*self.outputs, *(value for value in self.saved if isinstance(value, torch.Tensor))]

    def take(self, rows: torch.Tensor, picks: Sequence[int] = ()) -> list[torch.Tensor]:
        """The samples ``rows``, int64, shape (m,), of the model's outputs; those that have one with a graph.

        Args:
            rows (torch.Tensor): The samples.
            picks (Sequence[int], optional): Which of the picks they are, by whose backward pass it is told when all
                are over. Default: ``()``.
        """
        graphed: Any = _SlicedBackward.apply(self, rows, picks, *self.parameters)
        taken = dict(zip(self._differentiable, graphed, strict=True))
        return [taken[i] if i in taken else output.index_select(0, rows) for i, output in enumerate(self.outputs)]

    def backward(
        self, graph: Any, rows: torch.Tensor, tangents: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The parameters' gradients, in their order, of the samples ``rows`` by the gradients of their outputs.

        Outputs without a gradient give none to the parameters that reach no other. ``graph`` is what autograd calls
        this from. The last backward pass of the picks, unless it keeps its graph,
        lets go of the saved tensors on its way.
        """
        graphs = self.graphs
        assert graphs.sliced is not None
        last = self._is_over(graph)
        self.spent |= last
        outputs = [self.outputs[i] for i in self._differentiable]
        filled = [
            output.new_zeros(len(rows), *output.shape[1:]) if tangent is None else tangent.contiguous()
            for output, tangent in zip(outputs, tangents, strict=True)
        ]
        sizes = graphs.saved_sizes(len(rows), self._sizes)
        gradients = graphs.sliced(*sizes, *filled, _Saved(self.saved, last), rows, self._sizes)
        if last:
            self.saved = []
        given = {i for i, tangent in enumerate(tangents) if tangent is not None}
        return [gradients[i] if given & graphs.tangents_of[i] else None for i in self._places]

    def _is_over(self, graph: Any) -> bool:
        """Whether no other backward pass of the picks is to come when this one is over."""
        if _get_current_graph_task_keep_graph():
            return False
        self.open.discard(graph)
        picks = set(graph.picks)
        # Picks that come again are made anew, in smaller microbatches, because memory ran out.
        self._over = picks if picks & self._over else self._over | picks
        return len(self._over) == self.num_picks and not self.open


class _SlicedBackward(torch.autograd.Function):
    """The picked rows of the outputs of a forward pass that is over, as a function of the parameters."""

    @staticmethod
    def forward(
        ctx: Any, run: Run, rows: torch.Tensor, picks: Sequence[int], *_: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(rows)
        ctx.set_materialize_grads(False)
        ctx.run, ctx.picks = run, picks
        run.open.add(ctx)
        return tuple(run.outputs[i].index_select(0, rows) for i in run._differentiable)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors  # Which says so if the graph is gone.
        gradients = ctx.run.backward(ctx, rows, tangents)
        if not _get_current_graph_task_keep_graph():
            ctx.run = None
        return None, None, None, *gradients
