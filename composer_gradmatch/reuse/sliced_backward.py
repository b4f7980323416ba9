"""The backward pass of some samples, from what a forward pass over all of them has saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch.autograd.function import once_differentiable

from composer_gradmatch.forward.torch_private import keeps_graph
from composer_gradmatch.reuse.graphs import Graphs
from composer_gradmatch.reuse.slices import Saved
from composer_gradmatch.reuse.unsupported import UnsupportedError

__all__ = ["SavedPass"]


class SavedPass:
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

    def let_go_of_activations(self) -> None:
        """Lets go of what the forward graph has saved: there is no backward pass any more."""
        self.saved = []

    @property
    def in_low_precision(self) -> bool:
        """Whether some of it was computed in 16 bits, as long as the activations are there."""
        tensors = [*self.outputs, *(value for value in self.saved if isinstance(value, torch.Tensor))]
        return any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)

    def take(self, rows: torch.Tensor, picks: Sequence[int] = ()) -> list[torch.Tensor]:
        """Gives the samples ``rows``, int64, shape (m,), of the model's outputs; those that have one with a graph.

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
        """Gives the parameters' gradients, in their order, of the samples ``rows`` by the gradients of their outputs.

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
        gradients = graphs.sliced(*sizes, *filled, Saved(self.saved, last), rows, self._sizes)
        if last:
            self.saved = []
        given = {i for i, tangent in enumerate(tangents) if tangent is not None}
        return [gradients[i] if given & graphs.tangents_of[i] else None for i in self._places]

    def _is_over(self, graph: Any) -> bool:
        """Tells whether no other backward pass of the picks is to come when this one is over."""
        if keeps_graph():
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
        ctx: Any, run: SavedPass, rows: torch.Tensor, picks: Sequence[int], *_: torch.Tensor
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
        if not keeps_graph():
            ctx.run = None
        return None, None, None, *gradients
