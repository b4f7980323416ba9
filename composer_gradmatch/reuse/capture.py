"""Tracing a model's forward pass into a forward and a backward graph in which the number of samples is a symbol."""

from __future__ import annotations

import itertools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import sympy
import torch
from functorch.compile import default_partition
from torch import fx, nn
from torch._dynamo import symbolic_convert
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import _debug_get_cache_entry_list, remove_from_cache
from torch.utils._pytree import tree_flatten, tree_unflatten

from composer_gradmatch.batches import map_tensors
from composer_gradmatch.reuse.outside import NumbersOutside
from composer_gradmatch.reuse.sliced_backward import Graphs, Run
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError, first_line, unwrapped

__all__ = ["CapturedForward", "Pass"]

#: What says at length why a model cannot be captured, which the one warning says in a line.
_TALKATIVE = [
    logging.getLogger(f"torch.{name}")
    for name in (
        "_dynamo.convert_frame",
        "_dynamo.symbolic_convert",
        "_dynamo.utils",
        "fx.experimental.symbolic_shapes",
    )
]
_IGNORE_WARNINGS: Any = ("ignore", None, Warning, None, 0)

#: How often a model is captured before it is called unsupported: where sizes that vary are symbols, and where each is
#: a constant.
_CAPTURES, _CAPTURES_BY_SIZE = 16, 64


@dataclass(frozen=True)
class Pass:
    """One captured forward pass over a minibatch.

    Attributes:
        outputs (Any): What the model returned, its tensors without a graph.
        inputs (torch.Tensor, optional): The inputs of the watched layer, H, without a graph.
        run (Run): The saved tensors, and the backward pass of them.
        read (list[bool]): Which of the batch's tensors the forward pass has read.
        holds (Callable): Whether it would be captured as the same graph now: whether what Python values, modules and
            hooks the model's forward reads are as they were.
    """

    outputs: Any
    inputs: torch.Tensor | None
    run: Run
    read: list[bool]
    holds: Callable[[], bool]

    def rows(self, rows: torch.Tensor, picks: Sequence[int] = ()) -> Any:
        """What the model returned, for the samples ``rows``, with the sliced backward pass as its graph.

        For ``picks`` see :meth:`.Run.take`.
        """
        leaves, structure = tree_flatten(self.outputs)
        # A tensor that is returned several times is one, and its gradients are added.
        taken = {id(whole): part for whole, part in zip(self.run.outputs, self.run.take(rows, picks), strict=True)}
        return tree_unflatten(
            [taken[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
        )


@dataclass
class _Recording:
    """What happens inside a compiled call: its backend keeps this, and nothing that keeps the compiled function."""

    compiled: bool
    num_samples: int = 0
    run: Run | None = None
    results: Sequence[Any] = ()
    arguments: Sequence[Any] = ()
    #: The ids of the batch's tensors.
    leaves: set[int] = field(default_factory=set)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps torch from saying on stderr, or in warnings, what happens while it captures.

    Not by ``warnings.catch_warnings``, after which Python shows again what it has shown once; nor by the levels of
    loggers, which each change makes all loggers find out anew.
    """
    quiet = [logger for logger in _TALKATIVE if not logger.disabled]
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    filters.insert(0, _IGNORE_WARNINGS)
    # It prints the graph where the number that decides on a branch is a tensor's.
    setattr(symbolic_convert, "print", lambda *_, **__: None)  # noqa: B010
    for logger in quiet:
        logger.disabled = True
    try:
        yield
    finally:
        filters.remove(_IGNORE_WARNINGS)
        delattr(symbolic_convert, "print")
        for logger in quiet:
            logger.disabled = False


class CapturedForward:
    """Runs a model's forward pass as a graph whose saved tensors can be sliced.

    The number of samples is a symbol in the graph. So is any other size of the batch's tensors that was seen to vary
    (lengths of sequences), unless ``varying`` is set to False.

    Args:
        forward (Callable): The model's forward, called on a batch.
        layer (nn.Module, optional): The layer whose inputs are watched. Default: ``None``.
        compiled (bool, optional): Whether the graphs are compiled by Inductor. Default: ``False``.
    """

    def __init__(self, forward: Callable[[Any], Any], layer: nn.Module | None = None, compiled: bool = False) -> None:
        self._layer, self._forward = layer, forward
        self._recording = _Recording(compiled)
        self._seen: list[torch.Tensor] = []
        #: Whether other sizes than the number of samples may be symbols, and whether any was in the last call.
        self.varying, self.varies = True, False
        self._shapes: list[torch.Size] = []
        self._varied: set[tuple[int, int]] = set()
        self._outside = NumbersOutside()
        self._last_guards: Any = None
        self._compiled = self._compile()

    def forget(self) -> None:
        """Lets the next call capture anew."""
        remove_from_cache(self._code)
        self._compiled = self._compile()

    def fix_sizes(self) -> None:
        """Lets each size but the number of samples be a constant, and captures for each anew."""
        self.varying = False
        self._compiled = self._compile()

    def _compile(self) -> Callable[[Any, list[torch.Tensor], tuple[Any, ...], int], tuple[Any, list[torch.Tensor]]]:
        forward, seen = self._forward, self._seen

        def traced(
            batch: Any, per_sample: list[torch.Tensor], autocast: tuple[str, torch.dtype, bool], outside: int
        ) -> tuple[Any, list[torch.Tensor]]:
            seen.clear()
            assert outside >= 0  # Which makes Dynamo guard its value.
            # Each comes with a symbol of its own, and models need not compare them.
            for one, other in itertools.pairwise(per_sample):
                assert len(one) == len(other)
            device, dtype, enabled = autocast
            with torch.autocast(device, dtype, enabled):
                return forward(batch), list(seen)

        # Dynamo keeps and counts what it has compiled by code object, which all functions made here would share.
        own = FunctionType(
            traced.__code__.replace(), traced.__globals__, traced.__name__, traced.__defaults__, traced.__closure__
        )
        # Dynamo would keep it, and all backends, for good.
        weakref.finalize(self, remove_from_cache, own.__code__).atexit = False
        self._code = own.__code__
        return torch.compile(own, backend=partial(_backend, self._recording), fullgraph=True)

    def __call__(self, batch: Any, num_samples: int) -> Pass:
        """Runs the forward pass over ``num_samples`` samples; buffers and generators change as in any forward pass.

        Where autocast is on, it is of the forward pass only: backward, the parts of a model that turn it off are in
        full precision, as they are where ``loss.backward()`` is called outside of it.

        Raises:
            UnsupportedError: If the model cannot be captured, or its activations not be sliced.
        """
        leaves: list[torch.Tensor] = []
        per_sample: list[torch.Tensor] = []
        self._recording.num_samples = num_samples

        def mark(leaf: torch.Tensor) -> torch.Tensor:
            # Gaps between rows would be a stride, and so a size that varies.
            leaf = leaf.detach() if leaf.is_contiguous() else leaf.detach().clone()
            if leaf.dim() and len(leaf) == num_samples:
                torch._dynamo.mark_dynamic(leaf, 0)
                per_sample.append(leaf)
            leaves.append(leaf)
            return leaf

        marked = map_tensors(mark, batch)
        sizes = self._varying_sizes(leaves)
        self.varies = bool(sizes)
        for leaf, dim in sizes:
            torch._dynamo.maybe_mark_dynamic(leaf, dim)
        device = leaves[0].device.type if leaves else "cpu"
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        containers = _containers(marked)
        recording = self._recording
        recording.run, recording.leaves = None, set(map(id, leaves))
        handle = None if self._layer is None else self._layer.register_forward_pre_hook(self._watch)
        limit = _CAPTURES if self.varying else _CAPTURES_BY_SIZE
        settings = {
            "automatic_dynamic_shapes": False,
            "assume_static_by_default": True,
            # Or another model's rate of dropout, earlier in the process, would make this one's a variable.
            "specialize_float": True,
            # Or a hook that comes later would be passed over.
            "skip_nnmodule_hook_guards": False,
            # Or a parameter that is unfrozen later would be, too.
            "skip_tensor_guards_with_matching_dict_tags": False,
            "cache_size_limit": limit,
        }
        try:
            # The graphs are traced and run without autocast around them: they have its casts in them.
            with torch.autocast(device, enabled=False):
                with (
                    torch.enable_grad(),
                    _quietly(),
                    torch._dynamo.config.patch(settings),
                    self._outside.recorded() as outside,
                ):
                    outputs, seen = self._compiled(marked, per_sample, autocast, outside)
                if recording.run is None:
                    raise UnsupportedError("its forward pass has no gradient")
                if _containers(marked) != containers:
                    raise UnsupportedError("its forward pass changes the items of its batch")
                values = {"batch": marked, "per_sample": per_sample, "autocast": autocast}
                return self._finish(outputs, seen, leaves, partial(self._holds, self._guards(outside), values, outside))
        except UnsupportedError:
            raise
        except Exception as error:
            if "Limit" in type(error).__name__:
                raise UnsupportedError(
                    f"it would have to be captured more than {limit} times: sizes, or numbers that its forward pass "
                    "reads, change between steps (a number that is held in a buffer may)"
                ) from error
            inner = unwrapped(error)
            if isinstance(inner, UnsupportedError):
                raise inner from None
            if isinstance(inner, torch.OutOfMemoryError):
                raise UnsupportedError(f"memory ran out in a forward pass over all {num_samples} samples") from error
            raise UnsupportedError(f"it cannot be captured as one graph: {first_line(inner)}") from error
        finally:
            if handle is not None:
                handle.remove()
            self._seen.clear()
            recording.run, recording.results, recording.arguments = None, (), ()

    def _guards(self, outside: int) -> Any:
        """Dynamo's guards of the graph that has just run: the entry used last comes first."""
        guards = _debug_get_cache_entry_list(self._code)[0].guard_manager
        if guards is not self._last_guards:
            self._last_guards = guards
            if any("environ" in part for part in guards.code_parts):
                self._outside.reads_environment(outside)
        return guards

    def _holds(self, guards: Any, values: dict[str, Any], outside: int) -> bool:
        if self._outside.number() != outside:
            return False
        device = values["autocast"][0]
        with ExitStack() as contexts:
            # Each context costs as much as the guards.
            if torch.is_autocast_enabled(device):
                contexts.enter_context(torch.autocast(device, enabled=False))
            if not torch.is_grad_enabled():
                contexts.enter_context(torch.enable_grad())
            if self._layer is not None:
                contexts.callback(self._layer.register_forward_pre_hook(self._watch).remove)
            return guards.check({**values, "outside": outside, "forward": self._forward, "seen": self._seen})

    def _varying_sizes(self, leaves: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
        """The sizes, but the number of samples, that differ from those of an earlier batch."""
        shapes = [leaf.shape for leaf in leaves]
        for i, (old, new) in enumerate(zip(self._shapes, shapes, strict=False)):
            self._varied.update((i, dim) for dim in range(1, min(len(old), len(new))) if old[dim] != new[dim])
        self._shapes = shapes
        found = [(leaf, dim) for i, leaf in enumerate(leaves) for dim in range(leaf.dim()) if (i, dim) in self._varied]
        # Sizes that are alike get one symbol.
        alike = any(leaf.shape[dim] == self._recording.num_samples for leaf, dim in found)
        return found if self.varying and not alike else []

    def _watch(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._seen.append(args[0].detach())

    def _finish(
        self, outputs: Any, seen: list[torch.Tensor], leaves: list[torch.Tensor], holds: Callable[[], bool]
    ) -> Pass:
        recording = self._recording
        run, recording.run = recording.run, None
        assert run is not None
        known = {id(leaf) for leaf in recording.arguments}
        read = [id(leaf) in known for leaf in leaves]
        if self._layer is not None and len(seen) != 1:
            raise UnsupportedError(f"the output layer ran {len(seen)} times in a forward pass")
        positions = {id(result): i for i, result in enumerate(recording.results)}
        flat, structure = tree_flatten(outputs)
        for leaf in flat:
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in positions:
                    raise UnsupportedError("it returns a tensor that its forward pass does not compute")
            elif not (leaf is None or isinstance(leaf, bool | int | float | str)):
                raise UnsupportedError(f"it returns a {type(leaf).__name__}, whose samples cannot be told")
        returned = list({id(leaf): leaf for leaf in flat if isinstance(leaf, torch.Tensor)}.values())
        with_gradient = [
            i for i, result in enumerate(recording.results) if isinstance(result, torch.Tensor) and result.requires_grad
        ]
        try:
            run.name_outputs([positions[id(leaf)] for leaf in returned], with_gradient)
        except UnsupportedError as error:
            if not isinstance(error, UndecidedError) and not all(map(_is_finite, [*returned, *leaves])):
                raise UndecidedError("a minibatch has inputs or outputs that are not finite") from error
            raise
        stripped = {id(leaf): output for leaf, output in zip(returned, run.outputs, strict=True)}
        outputs = tree_unflatten(
            [stripped[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in flat], structure
        )
        return Pass(outputs, seen[0].detach() if seen else None, run, read, holds)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all()) if tensor.is_floating_point() else True


def _containers(batch: Any) -> list[Any]:
    """The keys of a batch's containers, and which items they hold."""
    if isinstance(batch, Mapping):
        return [(key, id(item), _containers(item)) for key, item in batch.items()]
    return [(id(item), _containers(item)) for item in batch] if isinstance(batch, list | tuple) else []


def _backend(recording: _Recording, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Dynamo's backend: partitions the graph, and runs its forward part under record."""
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
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
            recording.run = Run(graphs[-1], list(args), list(outputs))
            args.clear()
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def compile_backward(module: fx.GraphModule, _: Any) -> Callable[[list[Any]], Any]:
        def never(args: list[Any]) -> Any:
            raise AssertionError("The whole backward pass is not run.")

        never._boxed_call = True  # type: ignore[attr-defined]
        return never

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
    """Whether two tensors are the same, where what is not a number equals itself."""
    if one.is_floating_point() or one.is_complex():
        same = (one == other) | (one.isnan() & other.isnan())
        return bool(same.all())
    return torch.equal(one, other)


def _batch_symbol(graph: fx.GraphModule, num_samples: int) -> sympy.Symbol:
    """The symbol of the number of samples, the only size that varies and is ``num_samples``."""
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
