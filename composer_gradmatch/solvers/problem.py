"""What a solver is given: K, t, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["DEPENDENT", "Problem", "dependence"]

#: Relative to a sample's own squared norm: below this, what is left of its gradient outside the span of the
#: picked ones is rounding error. Gradients come from float32 or bfloat16 forward passes, far above it.
DEPENDENT = 1e-10


def dependence(dtype: torch.dtype) -> float:
    """:data:`DEPENDENT` for arithmetic in this dtype: at least what rounding leaves of a dependent sample.

    Args:
        dtype (torch.dtype): float64 or float32.
    """
    # k products are subtracted from the squared norm, each rounded by eps of it at most. At random that adds up to
    # √k, which is 32 for the most picks of one kernel.
    return max(DEPENDENT, 32 * torch.finfo(dtype).eps)


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
    """

    gram: np.ndarray
    target: np.ndarray
    k: int
    ridge: float = 0.0
    enough: float = float("inf")

    def diagonal(self) -> np.ndarray:
        """The diagonal of K', shape (M,), float64."""
        return np.diagonal(self.gram).astype(np.float64) + self.ridge

    def floor(self) -> np.ndarray:
        """The α of each sample, shape (M,), below which it has nothing to gain."""
        norm = np.sqrt(np.clip(self.diagonal(), 0.0, None))
        # The best correlation with a single sample bounds ‖ḡ‖ from below and so sets the scale of all α.
        correlation = np.divide(self.target, norm, out=np.zeros(len(norm)), where=norm > 0)
        # A mean gradient that cancels to zero leaves only the rounding error of its products in the target.
        rounding = 8 * np.finfo(np.float64).eps * norm.max(initial=0.0)
        return max(DEPENDENT * np.abs(correlation).max(initial=0.0), rounding) * norm
