"""How a tensor of a traced forward pass is laid out along the batch: determined on two copies, not guessed.

The symbolic shape says which dimension holds the samples, and how many elements k of it belong to one. Where k > 1
it does not say in which order: a linear layer on (M, T, D) saves an (M·T, D) whose samples come first, one on
(T, M, D) an (M·T, D) whose positions do. So the forward graph runs on a few samples and on two copies of them, and
the layout is the one in which both copies of a tensor show what the samples alone gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import sympy
import torch
from torch import fx

from composer_gradmatch.reuse.unsupported import UnsupportedError

__all__ = ["Layout", "Sizes", "at", "determine_layouts", "is_random"]

#: Symbols of sizes, and what they are in a batch.
Sizes = tuple[tuple[sympy.Symbol, int], ...]

#: Samples of which two copies are made.
_PROBES = 3


@dataclass(frozen=True)
class Layout:
    """Where a tensor has its samples: dimension ``dim`` is (``outer``, M, ``inner``), flattened.

    Attributes:
        dim (int): The dimension.
        outer (sympy.Expr): How many blocks of M samples there are; varies with other sizes than M. Default: ``1``.
        inner (sympy.Expr): How many neighbours belong to one sample. Default: ``1``.
    """

    dim: int
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One

    def take(self, tensor: torch.Tensor, rows: torch.Tensor, sizes: Sizes = ()) -> torch.Tensor:
        """The samples ``rows``, int64, shape (m,), in a tensor of the same layout, at the other ``sizes``."""
        outer, inner = at(self.outer, sizes), at(self.inner, sizes)
        if outer == inner == 1:
            return tensor.index_select(self.dim, rows)
        split = tensor.unflatten(self.dim, (outer, -1, inner))
        return split.index_select(self.dim + 1, rows).flatten(self.dim, self.dim + 2)


@lru_cache(maxsize=4096)
def at(expression: sympy.Expr, sizes: Sizes) -> int:
    """The value of a size.

    Raises:
        UnsupportedError: If it depends on more than ``sizes``.
    """
    value = expression.subs(dict(sizes))
    if not value.is_Integer:
        raise UnsupportedError(f"the size {expression} is not known by what the forward pass is called with")
    return int(value)


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers; attention without dropout, tagged so, does not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for i, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return bool(given != 0)
    return True


def _candidates(value: torch.Tensor, batch: sympy.Symbol) -> list[Layout]:
    """The layouts that a symbolic shape admits; none where it does not depend on the number of samples."""
    found = []
    for dim, size in enumerate(value.shape):
        expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
        if batch not in expression.free_symbols:
            continue
        if found:
            raise UnsupportedError(f"a tensor of shape {tuple(value.shape)} has the samples in two dimensions")
        each: Any = sympy.factor(expression / batch)
        if batch in each.free_symbols or not each.as_coeff_Mul()[0].is_Integer:
            raise UnsupportedError(f"a tensor's size {expression} is no multiple of the number of samples {batch}")
        found = [Layout(dim, outer, sympy.cancel(each / outer)) for outer in _divisors(each)]
    return found


def _divisors(size: Any) -> list[Any]:
    """The products of a size's factors."""
    number, rest = size.as_coeff_Mul()
    numbers = [[sympy.Integer(divisor) for divisor in sympy.divisors(int(number))]]
    powers = [[base**i for i in range(int(power) + 1)] for base, power in rest.as_powers_dict().items() if base != 1]
    return [sympy.prod(factors) for factors in product(*numbers, *powers)]


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The distance of two tensors relative to their size; for whole numbers, the share of those that differ."""
    if not one.is_floating_point():
        return float((one != other).double().mean()) if one.numel() else 0.0
    wide = torch.promote_types(one.dtype, torch.float32)
    size = one.norm(dtype=wide)
    same = torch.equal(one.isfinite(), other.isfinite())
    one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
    error = (one.to(wide) - other.to(wide)).norm()
    return 0.0 if same and float(error) == 0 else float(error / size) if same and float(size) > 0 else float("inf")


class _Probe:
    """The values of a forward graph on a few samples and on two copies of them, node by node."""

    def __init__(self, batch: sympy.Symbol, probes: int, sizes: Sizes) -> None:
        self.batch, self.probes, self.sizes = batch, probes, sizes
        self.half: dict[fx.Node, Any] = {}
        self.both: dict[fx.Node, Any] = {}
        self.layouts: dict[fx.Node, Layout | None] = {}

    def layout(self, node: fx.Node) -> Layout | None:
        """The layout of a node's tensor; None where it does not depend on the number of samples."""
        if node not in self.layouts:
            self.layouts[node] = self._find(node)
        return self.layouts[node]

    def _find(self, node: fx.Node) -> Layout | None:
        half, both = self.half[node], self.both[node]
        candidates = _candidates(node.meta["val"], self.batch)
        tolerance = 3e-2 if half.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if not candidates:
            if half.shape != both.shape or _difference(half, both) > tolerance:
                raise UnsupportedError(
                    f"a saved tensor ({node.name}) belongs to no sample, but depends on their number"
                )
            return None
        copies = [torch.arange(self.probes, device=half.device) + i * self.probes for i in range(2)]
        fitting = [
            layout
            for layout in candidates
            if all(_difference(half, layout.take(both, rows, self.sizes)) <= tolerance for rows in copies)
        ]
        if len(fitting) != 1:
            what = "no order" if not fitting else "more than one order"
            raise UnsupportedError(f"a saved tensor ({node.name}) has its samples in {what} that two copies show")
        return fitting[0]

    def run(self, node: fx.Node) -> None:
        """Computes a node on both; random numbers are the same in both copies."""
        half = self._call(node, self.half)
        if is_random(node):
            both = self._doubled(node, half)
        elif isinstance(node.target, torch._ops.OpOverload) and "empty" in node.target.name():
            # Whatever it holds is not read, but must not be told apart, either.
            half, both = half.zero_(), self._call(node, self.both).zero_()
            self._inherit(node)
        else:
            both = self._call(node, self.both)
        self.half[node], self.both[node] = half, both

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _inherit(self, node: fx.Node) -> Layout | None:
        """Takes over the layout of an argument of the same shape: what is like a tensor is laid out like it."""
        candidates = _candidates(node.meta["val"], self.batch)
        if len(candidates) == 1:
            self.layouts[node] = candidates[0]
        elif not candidates:
            self.layouts[node] = None
        for argument in node.all_input_nodes:
            value = argument.meta.get("val")
            if isinstance(value, torch.Tensor) and value.shape == node.meta["val"].shape:
                self.layouts[node] = self.layout(argument)
        if node not in self.layouts and is_random(node):
            raise UnsupportedError(f"random numbers ({node.name}) are drawn in an order that nothing shows")
        return self.layouts.get(node)

    def _doubled(self, node: fx.Node, half: Any) -> Any:
        """The random numbers of ``half``, for both copies."""

        def double(value: torch.Tensor, layout: Layout | None) -> torch.Tensor:
            if layout is None:
                return value
            return layout.take(value, torch.arange(2 * self.probes, device=value.device) % self.probes, self.sizes)

        if isinstance(half, torch.Tensor):
            return double(half, self._inherit(node))
        argument = node.all_input_nodes[0]
        shape = argument.meta["val"].shape
        if any(value.shape != shape for value in node.meta["val"]):
            raise UnsupportedError(f"{node.target} draws random numbers of its own for each sample")
        return tuple(double(value, self.layout(argument)) for value in half)


@torch.no_grad()
def determine_layouts(
    graph: fx.GraphModule,
    args: Sequence[Any],
    batch: sympy.Symbol,
    wanted: Callable[[fx.Node], bool],
    sizes: Sizes = (),
) -> dict[fx.Node, Layout | None]:
    """How the tensors that a forward graph puts out are laid out along the batch.

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
        UnsupportedError: If a layout cannot be told beyond doubt.
    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    probe = _Probe(batch, _PROBES, sizes)
    for node, value in zip(placeholders, args, strict=True):
        symbolic = node.meta["val"]
        if isinstance(symbolic, torch.SymInt):
            probe.half[node], probe.both[node] = (
                at(symbolic.node.expr, ((batch, few), *sizes)) for few in (_PROBES, 2 * _PROBES)
            )
        elif isinstance(value, torch.Tensor):
            layouts = _candidates(symbolic, batch)
            if len(layouts) > 1:
                raise UnsupportedError(f"an input of shape {tuple(value.shape)} has several rows for each sample")
            layout = probe.layouts[node] = layouts[0] if layouts else None
            probe.half[node] = probe.both[node] = value
            if layout is not None:
                # Of two samples, the first comes twice: what is alike in the half says nothing, and is not needed.
                few = torch.arange(_PROBES, device=value.device) % value.shape[layout.dim]
                probe.half[node], probe.both[node] = layout.take(value, few), layout.take(value, torch.cat([few, few]))
        else:
            probe.half[node] = probe.both[node] = value
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                probe.half[node] = probe.both[node] = getattr(graph, str(node.target))
            elif node.op == "call_function":
                probe.run(node)
    outputs = [out for out in graph.graph.output_node().args[0] if isinstance(out, fx.Node)]  # type: ignore[union-attr]
    tensors = [out for out in outputs if isinstance(out.meta.get("val"), torch.Tensor)]
    return {out: probe.layout(out) for out in tensors if wanted(out)}
