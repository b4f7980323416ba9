"""Gradient matching: the weighted samples whose mean gradient best matches the whole minibatch's (Algorithm 1)."""

from __future__ import annotations

import torch

from composer_gradmatch.matching import Solver, WeightKind
from composer_gradmatch.matching.weighted_picks import match_mean_gradient, match_on_device
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks, WholeBatch

__all__ = ["decides_on_device", "gradient_matching"]


def decides_on_device(gram: torch.Tensor, solver: Solver, tolerance: float) -> bool:
    """Tells whether the host need not know what is picked: the number of picks is fixed, and the solver a kernel.

    Args:
        gram (torch.Tensor): K.
        solver (str | Callable): See :func:`.gram_omp`.
        tolerance (float): See :func:`.gram_omp`.
    """
    return gram.device.type != "cpu" and solver == "omp" and tolerance == 0


def gradient_matching(
    candidates: Candidates,
    m: int,
    *,
    solver: Solver = "omp",
    ridge: float = 0.0,
    tolerance: float = 0.0,
    weights: WeightKind = "normalized",
) -> Picks | WholeBatch:
    """Picks by orthogonal matching pursuit on K (Algorithm 2 of Balles et al., 2023).

    Weights are clipped at zero, and normalised to sum to the number of picks unless asked otherwise. On a GPU, with
    ``solver="omp"`` and no tolerance, there are always m picks, and the host does not wait for them: see
    :func:`.match_on_device`.

    Args:
        candidates (Candidates): With gradients.
        m (int): The largest number of picks.
        solver (str | Callable, optional): See :func:`.gram_omp`. Default: ``"omp"``.
        ridge (float, optional): See :func:`.gram_omp`. Default: ``0.0``.
        tolerance (float, optional): See :func:`.gram_omp`. Default: ``0.0``.
        weights (str, optional): See :data:`.WeightKind`. Default: ``"normalized"``.

    Returns:
        Picks | WholeBatch: The minibatch whole where its mean gradient is zero, or gradients are not finite.
    """
    gram = candidates.gram
    if decides_on_device(gram, solver, tolerance):
        match = match_on_device(gram, m, ridge=ridge, kind=weights)
    elif not candidates.finite:
        return WholeBatch(
            "a minibatch has last-layer gradients that are not finite; it and others like it are trained whole."
        )
    else:
        match = match_mean_gradient(gram, m, solver=solver, ridge=ridge, tolerance=tolerance, kind=weights)
    if match is None:
        return WholeBatch()
    return Picks(match.indices, match.weights, match.metrics(candidates.num_samples), match.found)
