"""The Gram matrix of the samples' gradients at a linear output layer.

For m samples, an output layer with d inputs and c outputs, and losses ℓₘ: H (M×D) holds its inputs, and P
(M×C) the gradients of the *sum* of the losses with respect to its outputs, so that row m is sample m's own.
The gradient of ℓₘ with respect to the layer's weight is then pₘhₘᵀ, and to its bias pₘ.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from composer_gradmatch.last_layer.position_gram import position_gram

__all__ = ["last_layer_gram"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def last_layer_gram(inputs: Array, output_grads: Array, bias: bool = True) -> Array:
    """Computes the Gram matrix of the samples' last-layer gradients, K = HHᵀ∘PPᵀ + PPᵀ (eq. 4), never forming them.

    Where the layer runs at T positions of each sample, a sample's gradient is the sum over its positions,
    gᵢ = Σₜ pᵢₜhᵢₜᵀ, and Kᵢⱼ = Σₜₛ (hᵢₜ·hⱼₛ + 1)(pᵢₜ·pⱼₛ); positions whose gradient is zero cost nothing.

    Args:
        inputs (np.ndarray | torch.Tensor): H, the layer's inputs, shape (M, D) or (M, T, D).
        output_grads (np.ndarray | torch.Tensor): P, gradients of the sum of the per-sample losses with respect
            to the layer's outputs, shape (M, C) or (M, T, C).
        bias (bool, optional): Whether the layer has a bias; without one the term PPᵀ is left out.
            Default: ``True``.

    Returns:
        np.ndarray | torch.Tensor: K, shape (M, M), in the inputs' kind, device and precision. Pass float64 for a
        Gram matrix that :func:`.gram_omp` can tell duplicates from neighbours by.

    Raises:
        ValueError: If the shapes are not (M, D) and (M, C), or (M, T, D) and (M, T, C).
    """
    if inputs.ndim != output_grads.ndim or inputs.ndim not in (2, 3) or inputs.shape[:-1] != output_grads.shape[:-1]:
        raise ValueError(
            "inputs must have shape (M, D) and output_grads (M, C) with the same number of samples M, or (M, T, D) and "
            f"(M, T, C) with the same positions, too; got {tuple(inputs.shape)} and {tuple(output_grads.shape)}."
        )
    if inputs.ndim == 3:
        h, p = torch.as_tensor(inputs), torch.as_tensor(output_grads)
        kept = p.ne(0).any(-1)
        gram = position_gram(h[kept], p[kept], kept.sum(1), p.shape[-1], bias).to(h.dtype)
        return gram if isinstance(inputs, torch.Tensor) else gram.numpy()  # pyright: ignore[reportReturnType]
    products = inputs @ inputs.T
    if bias:
        products += 1
    return products * (output_grads @ output_grads.T)
