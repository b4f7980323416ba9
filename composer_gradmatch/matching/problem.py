"""What a solver is given: K, t, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["DEPENDENT", "EXACT", "Precision", "Problem", "cancels", "dependence"]

#: Relative to a sample's own squared norm: below this, what is left of its gradient outside the span of the
#: picked ones is rounding error. Gradients come from float32 or bfloat16 forward passes, far above it. It is for K in
#: float64: see :attr:`Precision.dependent` for others.
DEPENDENT = 1e-10


def dependence(dtype: torch.dtype) -> float:
    """Finds :data:`DEPENDENT` for arithmetic in this dtype: at least what rounding leaves of a dependent sample.

    Args:
        dtype (torch.dtype): float64 or float32.
    """
    # k products are subtracted from the squared norm, each rounded by eps of it at most. At random that adds up to
    # √k, which is 32 for the most picks of one kernel.
    return max(DEPENDENT, 32 * torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Precision:
    """How exactly K and t are given, which bounds what can be told from them, however exact the arithmetic.

    Attributes:
        eps (float): The spacing of their numbers, relative.
        tiny (float): The spacing next to zero, absolute; 0 for none that matters.
    """

    eps: float
    tiny: float = 0.0

    @classmethod
    def of(cls, *infos: np.finfo | torch.finfo) -> Precision:
        """Takes the coarsest of several floating dtypes; float64 where it is one of no less.

        Args:
            *infos (np.finfo | torch.finfo): What torch or numpy says of the dtypes.
        """
        coarser = [info for info in infos if float(info.eps) > EXACT.eps]
        if not coarser:
            return EXACT
        return cls(
            max(float(info.eps) for info in coarser), max(float(info.tiny) * float(info.eps) for info in coarser)
        )

    @property
    def dependent(self) -> float:
        """What rounding can leave of a linearly dependent sample, relative to the squared norms that it comes from.

        What is left of sample p outside the span of the picked is ‖gₚ − Σᵢcᵢgᵢ‖², in which the entries' rounding errors
        add up, at random, to eps·(‖gₚ‖² + Σᵢcᵢ²‖gᵢ‖²). An entry is several roundings: of its factors, their products
        and its own. On gradients of known rank 4·eps took no dependent sample in float32, float16 and bfloat16, where
        1·eps took some.
        """
        return max(DEPENDENT, 4 * self.eps)


#: K and t in float64, or in integers.
EXACT = Precision(float(np.finfo(np.float64).eps))


def cancels(gram: np.ndarray | torch.Tensor, target: np.ndarray | torch.Tensor, precision: Precision) -> bool:
    """Tells whether t is but the rounding error of row means of K that cancel.

    Float64 needs no such look: its rounding is that of the α themselves, which :meth:`Problem.floor` has.

    Args:
        gram (np.ndarray | torch.Tensor): K, shape (M, M), of any floating dtype.
        target (np.ndarray | torch.Tensor): t, shape (M,), of any floating dtype.
        precision (Precision): How exactly they were given.
    """
    if precision == EXACT:
        return False
    # Where numbers have few bits left, next to zero, a solver would amplify what is lost of them: 32 are five bits.
    noise = 2 * precision.eps * abs(gram).mean(1) + 32 * precision.tiny
    return bool((abs(target) <= noise).all() and (abs(gram.mean(1)) <= noise).all())


@dataclass(frozen=True)
class Problem:
    """min_w ‖Σᵢ wᵢgᵢ − ḡ‖² + λ‖w‖² subject to ‖w‖₀ ≤ k, in inner products.

    With K' = K + λI the penalty is part of the Gram matrix: each sample's gradient gets a coordinate of its own,
    of length √λ, in which ḡ is zero. So α = t − K[:, I]γ holds for the samples that are not picked, and the
    smallest error on a picked set is ‖ḡ‖² − ‖z‖² with z = L⁻¹t[I] and LLᵀ = K'[I, I].

    Attributes:
        gram (np.ndarray): K, shape (M, M), symmetric, of any floating dtype and strides; never copied as a whole.
        target (np.ndarray): t, shape (M,), float64.
        k (int): The largest number of picks.
        ridge (float): λ, absolute.
        enough (float): The ‖z‖² at which the error is small enough to stop; infinity for never.
        precision (Precision): How exactly K and t were given, of whatever dtype they are here.
    """

    gram: np.ndarray
    target: np.ndarray
    k: int
    ridge: float = 0.0
    enough: float = float("inf")
    precision: Precision = EXACT

    def diagonal(self) -> np.ndarray:
        """Gives the diagonal of K', shape (M,), float64."""
        return np.diagonal(self.gram).astype(np.float64) + self.ridge

    def least_pivots(self) -> np.ndarray:
        """Tells what must be left of each sample's squared norm, at the least, if it is not dependent, shape (M,)."""
        return self.precision.dependent * self.diagonal() + 4 * self.precision.tiny

    def floor(self) -> np.ndarray:
        """Gives the α of each sample, shape (M,), below which it has nothing to gain."""
        norm = np.sqrt(np.clip(self.diagonal(), 0.0, None))
        # The best correlation with a single sample bounds ‖ḡ‖ from below and so sets the scale of all α.
        correlation = np.divide(self.target, norm, out=np.zeros(len(norm)), where=norm > 0)
        # A mean gradient that cancels to zero leaves only the rounding error of its products in the target.
        rounding = 8 * np.finfo(np.float64).eps * norm.max(initial=0.0)
        return max(DEPENDENT * np.abs(correlation).max(initial=0.0), rounding) * norm
