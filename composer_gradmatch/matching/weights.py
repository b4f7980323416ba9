"""What becomes of weights: normalised, how well they match, and how many samples they are worth."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch

__all__ = ["WeightKind", "check_weight_kind", "effective_sample_size", "matching_residual", "normalize_weights"]

#: How long the picks' weighted mean is: ``"normalized"``, with weights that sum to the number of picks, as Algorithm 1
#: has it; or ``"matched"``, with n times the solver's own, so that (1/n)·Σwᵢgᵢ ≈ ḡ in length, too.
WeightKind = Literal["normalized", "matched"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def check_weight_kind(kind: str) -> None:
    """Raises if weights are asked for that there are not.

    Args:
        kind (str): See :data:`WeightKind`.

    Raises:
        ValueError: If it is none of them.
    """
    if kind not in get_args(WeightKind):
        raise ValueError(
            "weights must be 'normalized' (they sum to the number of picks, as in Algorithm 1) or 'matched' "
            f"(the solver's own, so that the step is as long as the whole minibatch's); got {kind!r}."
        )


def normalize_weights(weights: Array) -> Array:
    """Clips weights at zero and scales them to sum to their number (Algorithm 1, after the clipping of §4.2).

    Unweighted selection then corresponds to weights that are all one (the paper's footnote 3).

    Args:
        weights (np.ndarray | torch.Tensor): γ, shape (n,). Not modified.

    Returns:
        np.ndarray | torch.Tensor: Weights of the same kind, shape and dtype, non-negative, with sum n.

    Raises:
        ValueError: If no weight is positive, or one is not finite.
    """
    clipped = weights.clip(min=0)
    # Dividing by the largest first keeps the sum finite and away from zero at any scale.
    largest = float(clipped.max()) if len(clipped) else 0.0
    if not 0.0 < largest < float("inf"):
        raise ValueError(f"weights need at least one positive and only finite values, got {weights!r}.")
    clipped = clipped / largest
    return clipped * (len(clipped) / clipped.sum())  # pyright: ignore[reportReturnType]


def matching_residual(gram: Array, target: Array, indices: Array, weights: Array) -> Array:
    """Computes the relative matching residual ‖(1/n)Σᵢ wᵢgᵢ − ḡ‖² / ‖ḡ‖² of the weights that training uses.

    Normalised weights leave a larger one than the solver's own least-squares weights.

    Args:
        gram (np.ndarray | torch.Tensor): K, shape (M, M).
        target (np.ndarray | torch.Tensor): The row means of K, shape (M,).
        indices (np.ndarray | torch.Tensor): I, shape (n,).
        weights (np.ndarray | torch.Tensor): w, shape (n,).

    Returns:
        np.ndarray | torch.Tensor: The residual, a scalar of the same kind, on the device of ``gram``; 0 for a perfect
        match, NaN if ‖ḡ‖ = 0.
    """
    unit: Any = weights / len(weights)
    mean_squared: Any = target.mean()
    error = unit @ gram[indices][:, indices] @ unit - 2 * unit @ target[indices] + mean_squared
    if isinstance(mean_squared, torch.Tensor):
        return torch.where(mean_squared > 0, error.clamp(min=0) / mean_squared, torch.nan)  # pyright: ignore[reportReturnType]
    return error.clip(min=0) / mean_squared if mean_squared > 0 else mean_squared * np.nan


def effective_sample_size(weights: Array) -> Array:
    """Computes Kish's effective sample size (Σw)²/Σw², a scalar: n for n equal weights, 1 if one carries everything."""
    return weights.sum() ** 2 / (weights**2).sum()  # pyright: ignore[reportReturnType]
