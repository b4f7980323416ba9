"""TorchDynamo's backend: a forward and a backward graph of what it has traced, and the forward one run under record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn

from composer_gradmatch.forward.torch_private import HigherOrderOperator, aot_autograd, boxed, default_partition
from composer_gradmatch.reuse.graphs import Graphs
from composer_gradmatch.reuse.sliced_backward import SavedPass
from composer_gradmatch.reuse.unsupported import UnsupportedError

__all__ = ["Recording", "run_recorded"]


@dataclass
class Recording:
    """What happens inside a compiled call: its backend keeps this, and nothing that keeps the compiled function."""

    compiled: bool
    num_samples: int = 0
    run: SavedPass | None = None
    results: Sequence[Any] = ()
    arguments: Sequence[Any] = ()
    #: The ids of the batch's tensors.
    leaves: set[int] = field(default_factory=set)


def run_recorded(recording: Recording, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Serves as Dynamo's backend: partitions the graph, and runs its forward part under record."""
    for node in graph.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise UnsupportedError(
                f"it checkpoints activations, or calls another function of functions ({node.target})"
            )
    batch = _batch_symbol(graph, recording.num_samples)
    num_results = _copy_outputs(graph)
    graphs: list[Graphs] = []

    def partition(
        joint: fx.GraphModule, inputs: Sequence[Any], *, num_fwd_outputs: int, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
        num_mutated = num_fwd_outputs - num_results
        graphs.append(Graphs(forward, backward, batch, num_fwd_outputs, num_mutated, recording.compiled))
        return forward, backward

    def compile_forward(module: fx.GraphModule, _: Any) -> Callable[[list[Any]], Any]:
        def run(args: list[Any]) -> Any:
            if not graphs:
                return module(*args)
            outputs = graphs[-1].run_forward(*args)
            recording.run = SavedPass(graphs[-1], list(args), list(outputs))
            args.clear()
            return outputs

        return boxed(run)

    def compile_backward(module: fx.GraphModule, _: Any) -> Callable[[list[Any]], Any]:
        def never(args: list[Any]) -> Any:
            raise AssertionError("The whole backward pass is not run.")

        return boxed(never)

    compiled = aot_autograd(fw_compiler=compile_forward, bw_compiler=compile_backward, partition_fn=partition)(
        graph, example_inputs
    )

    shown = [False]

    def call(*args: Any) -> Any:
        results: Any = compiled(*args) if shown[0] else _without_a_trace(compiled, args, recording.leaves)
        shown[0] = True
        recording.results, recording.arguments = results, args
        return results

    return call


def _without_a_trace(compiled: Callable[..., Any], args: Sequence[Any], leaves: set[int]) -> Any:
    """What a graph returns that has not run before, unless it changes the batch or parameters, which it then has not.

    Contents are compared: not everything that changes a tensor counts a version.
    """
    own = [arg.clone() if id(arg) in leaves else arg for arg in args]
    parameters = [(arg, arg.detach().clone()) for arg in args if isinstance(arg, nn.Parameter)]
    results = compiled(*own)
    changed = [(parameter, before) for parameter, before in parameters if not _is_equal(parameter, before)]
    with torch.no_grad():
        for parameter, before in changed:
            parameter.copy_(before)
    if changed:
        raise UnsupportedError("its forward pass changes its parameters")
    if any(one is not other and not _is_equal(one, other) for one, other in zip(own, args, strict=True)):
        raise UnsupportedError("its forward pass changes its batch in place")
    return results


@torch.no_grad()
def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tells whether two tensors are the same, where what is not a number equals itself."""
    if one.is_floating_point() or one.is_complex():
        same = (one == other) | (one.isnan() & other.isnan())
        return bool(same.all())
    return torch.equal(one, other)


def _batch_symbol(graph: fx.GraphModule, num_samples: int) -> sympy.Symbol:
    """Gives the symbol of the number of samples, the only size that varies and is ``num_samples``."""
    values = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]
    found = {value.node.expr for value in values if isinstance(value, torch.SymInt) and value.node.hint == num_samples}
    if len(found) != 1 or not isinstance(symbol := found.pop(), sympy.Symbol):
        raise UnsupportedError("the number of samples is no size that can vary")
    return symbol


def _copy_outputs(graph: fx.GraphModule) -> int:
    """Lets a graph return copies of its tensors, which are views of nothing; returns how many outputs it has."""
    end = graph.graph.output_node()
    results = []
    for result in end.args[0]:  # type: ignore[union-attr]
        value = result.meta.get("example_value") if isinstance(result, fx.Node) else None
        if isinstance(result, fx.Node) and isinstance(value, torch.Tensor):
            with graph.graph.inserting_before(end):
                copy = graph.graph.call_function(torch.clone, (result,))
            copy.meta["example_value"] = value
            results.append(copy)
        else:
            results.append(result)
    end.args = (tuple(results),)
    graph.recompile()
    return len(results)
