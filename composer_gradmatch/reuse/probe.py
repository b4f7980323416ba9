"""How a tensor of a traced forward pass is laid out along the batch: determined on some samples, not guessed.

The symbolic shape says which dimension holds the samples, and how many elements k of it belong to one. Where k > 1
it does not say in which order: a linear layer on (M, T, D) saves an (M·T, D) whose samples come first, one on
(T, M, D) an (M·T, D) whose positions do. So each operation of the forward graph runs on a few samples, on a few
others, and on both together, and the layout is the one in which the tensor of both together shows what each had alone.

Where no layout shows it, samples are mixed. That is asked of every operation on the way, not of the last ones only, and
with parameters a little away from their own, so that a mixing layer is found though weights of zero hide it for now.
Each operation is given the same samples in all three cases, so that rounding does not add up. The only mixing layer
allowed is batch normalisation in training, whose statistics are those of both together: its backward pass has a
formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from composer_gradmatch.reuse.layout import Layout, Sizes, at, possible_layouts
from composer_gradmatch.reuse.operators import (
    argument_of,
    depend_on,
    is_random,
    needed_by,
    normalises_by_batch,
    operator_name,
)
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError, first_line

__all__ = ["determine_layouts"]

#: Samples of either half. The two are no multiples of each other, so that tensors that repeat show their order.
_PROBES = (3, 4)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Gives the distance of two tensors relative to their size; for whole numbers, the share of those that differ."""
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    if not one.is_floating_point():
        return float((one != other).double().mean()) if one.numel() else 0.0
    wide = torch.promote_types(one.dtype, torch.float32)
    size = one.norm(dtype=wide)
    same = torch.equal(one.isfinite(), other.isfinite())
    one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
    error = (one.to(wide) - other.to(wide)).norm()
    return 0.0 if same and float(error) == 0 else float(error / size) if same and float(size) > 0 else float("inf")


def _perturbed(value: torch.Tensor) -> torch.Tensor:
    """Gives a parameter each of whose values is a tenth away, or a buffer whose values are all alike a little apart.

    Weights of zero would hide what they are to scale, and like values in which order they stand. Positive values, of
    which a logarithm may be taken, stay positive.
    """
    if not value.is_floating_point() or not value.numel() or not value.isfinite().all():
        return value
    if value.requires_grad:
        size = value.norm() / value.numel() ** 0.5
        scale = torch.where(value == 0, size if size > 0 else 1, value.abs())
        return value + scale * torch.empty_like(value).uniform_(-0.1, 0.1)
    first = value.flatten()[0]
    return value + 0.1 * (first.abs() or 1) * torch.rand_like(value) if (value == first).all() else value


class _Probe:
    """The values of a forward graph on two halves of some samples, and on both together, node by node.

    Args:
        batch (sympy.Symbol): The number of samples.
        sizes (Sizes): The other sizes that vary.
        of_samples (set[fx.Node]): The nodes that depend on any sample.
    """

    def __init__(self, batch: sympy.Symbol, sizes: Sizes, of_samples: set[fx.Node]) -> None:
        self.batch, self.sizes, self._of_samples = batch, sizes, of_samples
        self.halves: tuple[dict[fx.Node, Any], dict[fx.Node, Any]] = {}, {}
        self.both: dict[fx.Node, Any] = {}
        self.layouts: dict[fx.Node, list[Layout | None]] = {}

    def give(self, node: fx.Node, halves: Sequence[Any], both: Any) -> None:
        """Sets a node's values."""
        self.halves[0][node], self.halves[1][node] = halves
        self.both[node] = both

    def forget(self, node: fx.Node) -> None:
        """Lets go of a node's values, which nothing will be computed of."""
        for values in (*self.halves, self.both):
            del values[node]

    def layout(self, node: fx.Node) -> Layout | None:
        """Gives the layout of a node's tensor; None where it does not depend on the number of samples."""
        fitting = self._fitting(node)
        if len(fitting) > 1:
            raise UnsupportedError(f"a saved tensor ({node.name}) has its samples in more than one possible order")
        return fitting[0]

    def _fitting(self, node: fx.Node) -> list[Layout | None]:
        """Gives the layouts, at least one, in which both together show what the halves do.

        Raises:
            UnsupportedError: If there is none.
        """
        if node in self.layouts:
            return self.layouts[node]
        both, halves = self.both[node], [half[node] for half in self.halves]
        tolerance = 3e-2 if both.dtype in (torch.float16, torch.bfloat16) else 1e-3
        candidates = possible_layouts(node.meta["val"], self.batch, counted=node not in self._of_samples)
        if not candidates:
            if any(half.shape != both.shape or _difference(half, both) > tolerance for half in halves):
                raise UnsupportedError(
                    f"layers mix samples: a tensor ({node.name}) belongs to none of them, but depends on which they are"
                )
            return self.layouts.setdefault(node, [None])
        errors = [
            max(_difference(half, part) for half, part in zip(halves, self._parts(both, layout), strict=True))
            for layout in candidates
        ]
        # Among tensors that are nearly alike, as attention is at the start, one order fits far better than the others.
        tolerance = min(tolerance, max(10 * min(errors), tolerance / 30))
        fitting: list[Layout | None] = [
            layout for layout, error in zip(candidates, errors, strict=True) if error <= tolerance
        ]
        if not fitting:
            raise UnsupportedError(
                f"layers mix samples: a sample's part of a tensor ({node.name}) depends on the others, or is in an "
                "order that cannot be found"
            )
        return self.layouts.setdefault(node, fitting)

    def _parts(self, both: torch.Tensor, layout: Layout | None) -> list[torch.Tensor]:
        """Gives the halves of both together."""
        if layout is None:
            return [both, both]
        rows = torch.arange(sum(_PROBES), device=both.device).split(_PROBES)
        return [layout.take(both, half, self.sizes) for half in rows]

    def run(self, node: fx.Node) -> None:
        """Computes a node on all three; random numbers are those of the halves."""
        if is_random(node):
            halves = [self._call(node, half) for half in self.halves]
            self.give(node, halves, self._joined(node, halves))
        elif "empty" in operator_name(node):
            # Whatever it holds is not read, but must not be told apart, either.
            self.give(
                node, [self._call(node, half).zero_() for half in self.halves], self._call(node, self.both).zero_()
            )
            self._inherit(node)
        elif normalises_by_batch(node, self.batch):
            both = self._call(node, self.both)
            halves = self._parts(both[0], self._fitting(argument_of(node, "input"))[0])
            self.give(node, [(half, *both[1:]) for half in halves], both)
        else:
            self.give(node, [self._call(node, half) for half in self.halves], self._call(node, self.both))
        if node in self._of_samples and isinstance(both := self.both[node], torch.Tensor):
            # What is computed of it next is then computed of the same samples.
            self.give(node, self._parts(both, self._fitting(node)[0]), both)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        assert callable(node.target)
        try:
            return node.target(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UnsupportedError(f"it cannot be run on a few samples ({node.name}): {first_line(error)}") from error

    def _inherit(self, node: fx.Node) -> Layout | None:
        """Takes over the layout of an argument of the same shape: what is like a tensor is laid out like it."""
        candidates = possible_layouts(node.meta["val"], self.batch)
        if len(candidates) <= 1:
            self.layouts[node] = [*candidates] or [None]
        for argument in node.all_input_nodes:
            value = argument.meta.get("val")
            if isinstance(value, torch.Tensor) and value.shape == node.meta["val"].shape:
                self.layouts[node] = [self.layout(argument)]
        if node not in self.layouts and is_random(node):
            raise UnsupportedError(f"random numbers ({node.name}) are drawn in an order that nothing shows")
        return self.layouts[node][0] if node in self.layouts else None

    def _joined(self, node: fx.Node, halves: Sequence[Any]) -> Any:
        """Tells what a node that draws random numbers would make of both together, had it drawn those of the halves."""

        def joined(values: Sequence[torch.Tensor], layout: Layout | None) -> torch.Tensor:
            if layout is None:
                raise UnsupportedError(f"all samples share the random numbers of {node.target}")
            return layout.join(values, self.sizes)

        if isinstance(halves[0], torch.Tensor):
            return joined(halves, self._inherit(node))
        argument = node.all_input_nodes[0]
        shape = argument.meta["val"].shape
        if any(value.shape != shape for value in node.meta["val"]):
            raise UnsupportedError(f"{node.target} draws random numbers of its own for each sample")
        return tuple(joined(values, self.layout(argument)) for values in zip(*halves, strict=True))


@torch.no_grad()
def determine_layouts(
    graph: fx.GraphModule,
    args: Sequence[Any],
    batch: sympy.Symbol,
    wanted: Callable[[fx.Node], bool],
    sizes: Sizes = (),
) -> dict[fx.Node, Layout | None]:
    """Tells how the tensors that a forward graph puts out are laid out along the batch.

    Args:
        graph (fx.GraphModule): The forward graph of AOTAutograd, functional, with ``val`` in each node's meta.
        args (Sequence[Any]): What it was called with on a batch of at least two samples.
        batch (sympy.Symbol): The number of samples.
        wanted (Callable): Whether the layout of an output is asked for.
        sizes (Sizes, optional): The other sizes that vary, as they are in ``args``. Default: ``()``.

    Returns:
        dict[fx.Node, Layout | None]: For each wanted output that is a tensor its layout; None where it does not depend
        on the number of samples.

    Raises:
        UndecidedError: If all samples are alike.
        UnsupportedError: If a layout cannot be told beyond doubt, or samples are mixed by anything but batch
            normalisation in training.
    """
    outputs = [out for out in graph.graph.output_node().args[0] if isinstance(out, fx.Node)]  # type: ignore[union-attr]
    ends = [out for out in outputs if isinstance(out.meta.get("val"), torch.Tensor) and wanted(out)]
    needed = needed_by(graph.graph.nodes, ends)
    per_sample = [
        node
        for node in graph.graph.find_nodes(op="placeholder")
        if isinstance(node.meta["val"], torch.Tensor) and possible_layouts(node.meta["val"], batch)
    ]
    drawn = [node for node in graph.graph.nodes if node.op == "call_function" and is_random(node)]
    of_samples = depend_on(graph.graph.nodes, [*per_sample, *drawn])
    last_use = {argument: node for node in graph.graph.nodes if node in needed for argument in node.all_input_nodes}
    alike = True
    probe = _Probe(batch, sizes, of_samples)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        for node, value in zip(graph.graph.find_nodes(op="placeholder"), args, strict=True):
            symbolic = node.meta["val"]
            if isinstance(symbolic, torch.SymInt):
                *halves, both = (at(symbolic.node.expr, ((batch, n), *sizes)) for n in (*_PROBES, sum(_PROBES)))
                probe.give(node, halves, both)
            elif node in per_sample:
                layouts = possible_layouts(symbolic, batch)
                if len(layouts) > 1:
                    raise UnsupportedError(f"an input of shape {tuple(value.shape)} has several rows for each sample")
                layout = layouts[0]
                probe.layouts[node] = [layout]
                # Of few samples, some come twice: what is alike in a half says nothing, and is not needed.
                size = value.shape[layout.dim]
                first, last = (torch.arange(n, device=value.device) for n in _PROBES)
                rows = [first % size, size - 1 - last % min(_PROBES[1], size - 1)]
                both = layout.take(value, torch.cat(rows))
                probe.give(node, [layout.take(value, half) for half in rows], both)
                alike &= torch.equal(both, layout.take(value, rows[0][:1].expand(sum(_PROBES))))
            else:
                if node in needed and isinstance(value, torch.Tensor):
                    value = _perturbed(value)
                probe.give(node, (value, value), value)
        if alike:
            raise UndecidedError("the samples of a minibatch are alike")
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                constant = getattr(graph, str(node.target))
                probe.give(node, (constant, constant), constant)
            elif node.op == "call_function" and node in needed:
                probe.run(node)
                for argument in node.all_input_nodes:
                    if last_use[argument] is node and (argument in of_samples or argument not in ends):
                        probe.forget(argument)
    return {out: probe.layout(out) for out in ends}
