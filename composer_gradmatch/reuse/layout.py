"""Where a tensor of a traced forward pass has its samples, as far as its symbolic shape tells.

The shape says which dimension holds the samples, and how many elements k of it belong to one. Where k > 1 it does not
say in which order: see :mod:`.probe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import sympy
import torch

from composer_gradmatch.reuse.unsupported import UnsupportedError

__all__ = ["Layout", "Sizes", "at", "possible_layouts"]

#: Symbols of sizes, and what they are in a batch.
Sizes = tuple[tuple[sympy.Symbol, int], ...]


@dataclass(frozen=True)
class Layout:
    """Where a tensor has its samples: dimension ``dim`` is (``outer``, M, ``inner``), flattened.

    Attributes:
        dim (int): The dimension.
        outer (sympy.Expr): How many blocks of M samples there are; varies with other sizes than M. Default: ``1``.
        inner (sympy.Expr): How many neighbours belong to one sample. Default: ``1``.
        counted (bool): Whether it shows how many samples there are and nothing of any (their indices, zeros): what m
            samples have is what the first m have, whichever they are. Default: ``False``.
    """

    dim: int
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One
    counted: bool = False

    def take(self, tensor: torch.Tensor, rows: torch.Tensor, sizes: Sizes = ()) -> torch.Tensor:
        """Gives the samples ``rows``, int64, shape (m,), in a tensor of the same layout, at the other ``sizes``."""
        if self.counted:
            rows = torch.arange(len(rows), device=rows.device)
        outer, inner = at(self.outer, sizes), at(self.inner, sizes)
        if outer == inner == 1:
            return tensor.index_select(self.dim, rows)
        split = tensor.unflatten(self.dim, (outer, -1, inner))
        return split.index_select(self.dim + 1, rows).flatten(self.dim, self.dim + 2)

    def join(self, tensors: Sequence[torch.Tensor], sizes: Sizes = ()) -> torch.Tensor:
        """Gives the samples of several tensors of the same layout, one tensor's after the other's."""
        outer, inner = at(self.outer, sizes), at(self.inner, sizes)
        split = [tensor.unflatten(self.dim, (outer, -1, inner)) for tensor in tensors]
        return torch.cat(split, self.dim + 1).flatten(self.dim, self.dim + 2)


@lru_cache(maxsize=4096)
def at(expression: sympy.Expr, sizes: Sizes) -> int:
    """Gives the value of a size.

    Raises:
        UnsupportedError: If it depends on more than ``sizes``.
    """
    value = expression.subs(dict(sizes))
    if not value.is_Integer:
        raise UnsupportedError(f"the size {expression} is not known by what the forward pass is called with")
    return int(value)


def possible_layouts(value: torch.Tensor, batch: sympy.Symbol, counted: bool = False) -> list[Layout]:
    """Gives the layouts that a symbolic shape admits; none where it does not depend on the number of samples."""
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
        found = [Layout(dim, outer, sympy.cancel(each / outer), counted) for outer in _divisors(each)]
    return found


def _divisors(size: Any) -> list[Any]:
    """Gives the products of a size's factors."""
    number, rest = size.as_coeff_Mul()
    numbers = [[sympy.Integer(divisor) for divisor in sympy.divisors(int(number))]]
    powers = [[base**i for i in range(int(power) + 1)] for base, power in rest.as_powers_dict().items() if base != 1]
    return [sympy.prod(factors) for factors in product(*numbers, *powers)]
