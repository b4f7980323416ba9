"""Tracing a model's forward pass into a forward and a backward graph in which the number of samples is a symbol."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from composer_gradmatch.batches import map_tensors
from composer_gradmatch.forward.torch_private import (
    cache_entries,
    dynamo_config,
    is_limit_of_captures,
    mark_dynamic,
    maybe_mark_dynamic,
    raised_by_backend,
    reads_environment,
    remove_from_cache,
    tree_flatten,
    tree_unflatten,
)
from composer_gradmatch.last_layer import OutputLayer
from composer_gradmatch.reuse.backend import Recording, run_recorded
from composer_gradmatch.reuse.outside import NumbersOutside
from composer_gradmatch.reuse.quietly import quietly
from composer_gradmatch.reuse.sliced_backward import SavedPass
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError, first_line

__all__ = ["CapturedForward", "Pass"]

#: How often a model is captured before it is called unsupported: where sizes that vary are symbols, and where each is
#: a constant.
_CAPTURES, _CAPTURES_BY_SIZE = 16, 64


@dataclass(frozen=True)
class Pass:
    """One captured forward pass over a minibatch.

    Attributes:
        outputs (Any): What the model returned, its tensors without a graph.
        inputs (torch.Tensor, optional): The inputs of the watched layer, H, without a graph.
        run (SavedPass): The saved tensors, and the backward pass of them.
        read (list[bool]): Which of the batch's tensors the forward pass has read.
        holds (Callable): Whether it would be captured as the same graph now: whether what Python values, modules and
            hooks the model's forward reads are as they were.
    """

    outputs: Any
    inputs: torch.Tensor | None
    run: SavedPass
    read: list[bool]
    holds: Callable[[], bool]

    def rows(self, rows: torch.Tensor, picks: Sequence[int] = ()) -> Any:
        """Tells what the model returned, for the samples ``rows``, with the sliced backward pass as its graph.

        For ``picks`` see :meth:`.SavedPass.take`.
        """
        leaves, structure = tree_flatten(self.outputs)
        # A tensor that is returned several times is one, and its gradients are added.
        taken = {id(whole): part for whole, part in zip(self.run.outputs, self.run.take(rows, picks), strict=True)}
        return tree_unflatten(
            [taken[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
        )


class CapturedForward:
    """Runs a model's forward pass as a graph whose saved tensors can be sliced.

    The number of samples is a symbol in the graph. So is any other size of the batch's tensors that was seen to vary
    (lengths of sequences), unless ``varying`` is set to False.

    Args:
        forward (Callable): The model's forward, called on a batch.
        layer (OutputLayer, optional): The layer whose inputs are watched. Default: ``None``.
        compiled (bool, optional): Whether the graphs are compiled by Inductor. Default: ``False``.
        model (nn.Module, optional): The module whose forward it is, if its hooks do not run. Default: ``None``.
    """

    def __init__(
        self,
        forward: Callable[[Any], Any],
        layer: OutputLayer | None = None,
        compiled: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self._forward = forward
        self._recording = Recording(compiled)
        seen: list[torch.Tensor] = []
        self._seen = seen
        # Always the same, so that Dynamo's guards of its hooks hold; and without self, which they would keep.
        self._watch = None
        if layer is not None:
            self._watch = layer.watch(lambda inputs, output: seen.append(inputs.detach()), True, model)
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
        forward, seen, watch = self._forward, self._seen, self._watch

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
                if watch is None:
                    return forward(batch), list(seen)
                watch.begin_pass()
                outputs = forward(batch)
                watch.end_pass()
                return outputs, list(seen)

        # Dynamo keeps and counts what it has compiled by code object, which all functions made here would share.
        own = FunctionType(
            traced.__code__.replace(), traced.__globals__, traced.__name__, traced.__defaults__, traced.__closure__
        )
        # Dynamo would keep it, and all backends, for good.
        weakref.finalize(self, remove_from_cache, own.__code__).atexit = False
        self._code = own.__code__
        return torch.compile(own, backend=partial(run_recorded, self._recording), fullgraph=True)

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
                mark_dynamic(leaf, 0)
                per_sample.append(leaf)
            leaves.append(leaf)
            return leaf

        marked = map_tensors(mark, batch)
        sizes = self._varying_sizes(leaves)
        self.varies = bool(sizes)
        for leaf, dim in sizes:
            maybe_mark_dynamic(leaf, dim)
        device = leaves[0].device.type if leaves else "cpu"
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        containers = _containers(marked)
        recording = self._recording
        recording.run, recording.leaves = None, set(map(id, leaves))
        if self._watch is not None:
            self._watch.open()
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
                    quietly(),
                    dynamo_config.patch(settings),
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
            if is_limit_of_captures(error):
                raise UnsupportedError(
                    f"it would have to be captured more than {limit} times: sizes, or numbers that its forward pass "
                    "reads, change between steps (a number that is held in a buffer may)"
                ) from error
            inner = raised_by_backend(error)
            if isinstance(inner, UnsupportedError):
                raise inner from None
            if isinstance(inner, torch.OutOfMemoryError):
                raise UnsupportedError(f"memory ran out in a forward pass over all {num_samples} samples") from error
            raise UnsupportedError(f"it cannot be captured as one graph: {first_line(inner)}") from error
        finally:
            if self._watch is not None:
                self._watch.close()
            self._seen.clear()
            recording.run, recording.results, recording.arguments = None, (), ()

    def _guards(self, outside: int) -> Any:
        """Finds Dynamo's guards of the graph that has just run: the entry used last comes first."""
        guards = cache_entries(self._code)[0].guard_manager
        if guards is not self._last_guards:
            self._last_guards = guards
            if reads_environment(guards):
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
            if self._watch is not None:
                contexts.enter_context(self._watch)
            closure = {"forward": self._forward, "seen": self._seen, "watch": self._watch}
            return guards.check({**values, "outside": outside, **closure})

    def _varying_sizes(self, leaves: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
        """Gives the sizes, but the number of samples, that differ from those of an earlier batch."""
        shapes = [leaf.shape for leaf in leaves]
        for i, (old, new) in enumerate(zip(self._shapes, shapes, strict=False)):
            self._varied.update((i, dim) for dim in range(1, min(len(old), len(new))) if old[dim] != new[dim])
        self._shapes = shapes
        found = [(leaf, dim) for i, leaf in enumerate(leaves) for dim in range(leaf.dim()) if (i, dim) in self._varied]
        # Sizes that are alike get one symbol.
        alike = any(leaf.shape[dim] == self._recording.num_samples for leaf, dim in found)
        return found if self.varying and not alike else []

    def _finish(
        self, outputs: Any, seen: list[torch.Tensor], leaves: list[torch.Tensor], holds: Callable[[], bool]
    ) -> Pass:
        recording = self._recording
        run, recording.run = recording.run, None
        assert run is not None
        known = {id(leaf) for leaf in recording.arguments}
        read = [id(leaf) in known for leaf in leaves]
        if self._watch is not None and len(seen) != 1:
            raise UnsupportedError(f"the output layer was seen {len(seen)} times in a captured forward pass")
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
    """Gives the keys of a batch's containers, and which items they hold."""
    if isinstance(batch, Mapping):
        return [(key, id(item), _containers(item)) for key, item in batch.items()]
    return [(id(item), _containers(item)) for item in batch] if isinstance(batch, list | tuple) else []
