"""Algorithm 1 after its forward pass: from a Gram matrix to picked samples and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from composer_gradmatch.matching.gram_omp import gram_omp
from composer_gradmatch.matching.on_device import fixed_omp
from composer_gradmatch.matching.solvers import Solver
from composer_gradmatch.matching.weights import (
    WeightKind,
    effective_sample_size,
    matching_residual,
    normalize_weights,
)
from composer_gradmatch.spans import span

__all__ = ["Match", "match_mean_gradient", "match_on_device"]


@dataclass(frozen=True)
class Match:
    """The samples that match a minibatch's mean gradient.

    Attributes:
        indices (torch.Tensor): I, int64, shape (n,), in the order picked.
        weights (torch.Tensor): w ≥ 0, float64, shape (n,); with sum n, if they are normalised.
        residual (torch.Tensor): ‖(1/n)Σwᵢgᵢ − ḡ‖² / ‖ḡ‖² of the last-layer gradients, a scalar.
        found (torch.Tensor, optional): Whether there was a mean gradient to match, a boolean scalar; None where there
            was. Default: ``None``.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    residual: torch.Tensor
    found: torch.Tensor | None = None

    def metrics(self, num_samples: int) -> dict[str, float | torch.Tensor]:
        """Tells what to log of the match: numbers, or scalars on the device of the weights.

        Args:
            num_samples (int): M.
        """
        weights: Any = self.weights.numpy() if self.weights.device.type == "cpu" else self.weights
        matched = (weights > 0).sum()
        return {
            "fraction_kept": matched / num_samples,
            "effective_sample_size": effective_sample_size(weights),
            # Relative to the mean of those that are not zero.
            "largest_weight": weights.max() * matched / len(weights),
            "matching_residual": self.residual,
        }


def match_mean_gradient(
    gram: torch.Tensor,
    num_picks: int,
    *,
    solver: Solver = "omp",
    ridge: float = 0.0,
    tolerance: float = 0.0,
    kind: WeightKind = "normalized",
) -> Match | None:
    """Picks on the host, where each step can see what the one before has found.

    Weights are clipped at zero; then, of the n samples that are left, normalised to sum to n, or multiplied by n.

    Args:
        gram (torch.Tensor): K of the samples' last-layer gradients, shape (M, M), float64.
        num_picks (int): m, the largest number of picks.
        solver (str | Callable, optional): See :func:`.gram_omp`. Default: ``"omp"``.
        ridge (float, optional): See :func:`.gram_omp`. Default: ``0.0``.
        tolerance (float, optional): See :func:`.gram_omp`. Default: ``0.0``.
        kind (str, optional): See :data:`.WeightKind`. Default: ``"normalized"``.

    Returns:
        Match | None: The picks, on the CPU, or None if the mean gradient is zero: there is nothing to match.

    Raises:
        TypeError: If ``solver`` is a function and returns no pair.
        ValueError: If the Gram matrix is not finite, or what a function as ``solver`` returns is out of range.
    """
    with span("matching"):
        gram = gram.cpu()
        target = gram.mean(1)
        indices, weights = gram_omp(gram, target, num_picks, solver=solver, ridge=ridge, tolerance=tolerance)
    positive = weights > 0
    indices, weights = indices[positive], weights[positive]
    if not len(indices):
        return None
    weights = normalize_weights(weights) if kind == "normalized" else weights * len(weights)
    # As arrays: of so few numbers, what torch's operators cost is the calls.
    arrays = (each.detach().numpy() for each in (gram, target, indices, weights))
    return Match(indices, weights, torch.tensor(matching_residual(*arrays)))


def match_on_device(
    gram: torch.Tensor, num_picks: int, *, ridge: float = 0.0, kind: WeightKind = "normalized"
) -> Match:
    """Picks on the device of the Gram matrix, which the host does not wait for.

    So there are always m picks: with weight zero where matching pursuit stops early or its weight is clipped, and
    with weights one if there is nothing to match. Normalised weights sum to m, so that the weighted mean over the m
    samples is that over the samples of positive weight; others are m times the solver's own. Samples of weight zero
    still count where a batch counts its samples by other means: in BatchNorm's statistics, and in a loss divided by
    its class weights or labelled positions.

    Args:
        gram (torch.Tensor): K of the samples' last-layer gradients, shape (M, M), float64; finite or not.
        num_picks (int): m, the number of picks.
        ridge (float, optional): See :func:`.gram_omp`. Default: ``0.0``.
        kind (str, optional): See :data:`.WeightKind`. Default: ``"normalized"``.

    Returns:
        Match: The picks, on the device of ``gram``.
    """
    with span("matching"):
        target = gram.mean(1)
        indices, weights = fixed_omp(gram, target, num_picks, ridge)
    clipped = weights.clamp(min=0)
    largest = clipped.max()
    found = gram.isfinite().all() & (largest > 0)
    if kind == "normalized":
        clipped = clipped / largest
        scaled = clipped * (num_picks / clipped.sum())
    else:
        scaled = clipped * num_picks
    weights = torch.where(found, scaled, 1.0)
    return Match(indices, weights, matching_residual(gram, target, indices, weights), found)
