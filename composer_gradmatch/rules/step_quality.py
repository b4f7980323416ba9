"""How good a step on picks is, told from the minibatch's Gram matrix: its length, its error, and the gradient noise."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch

from composer_gradmatch.rules.picks import Picks

__all__ = ["StepQuality", "gradient_noise", "step_error"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)

#: What a step's numbers count in their running averages.
_NEW = 0.1


def gradient_noise(gram: Array) -> tuple[Any, Any]:
    """Estimates the squared norm of the data's mean gradient and the trace of its samples' covariance, both unbiased.

    For samples that are drawn independently, products of different samples' gradients have the mean ‖G‖², and their
    squared norms the mean ‖G‖² + tr Σ (McCandlish et al., 2018, appendix A.1). tr Σ/‖G‖² is the gradient noise scale,
    a number of samples: minibatches that are much larger average over what is already known.

    Args:
        gram (np.ndarray | torch.Tensor): K of last-layer gradients, shape (M, M), M > 1. So it is the last layer's
            noise.

    Returns:
        tuple: ‖G‖², which may come out negative where noise prevails, and tr Σ; scalars of the same kind.
    """
    m = len(gram)
    trace = gram.diagonal().sum()
    squared_norm = (gram.sum() - trace) / (m * (m - 1))
    return squared_norm, trace / m - squared_norm


def step_error(gram: Array, indices: Array, weights: Array | None) -> tuple[Any, Any]:
    """Compares the weighted mean gradient of picks with that of the minibatch, in the last layer.

    Args:
        gram (np.ndarray | torch.Tensor): K, shape (M, M).
        indices (np.ndarray | torch.Tensor): The picks, shape (n,).
        weights (np.ndarray | torch.Tensor, optional): Their weights, shape (n,); None for ones.

    Returns:
        tuple: The step length ⟨(1/n)Σwᵢgᵢ, ḡ⟩/‖ḡ‖², which is 1 for a step as long as the minibatch's, and the squared
        error ‖(1/n)Σwᵢgᵢ − ḡ‖²; scalars of the same kind.
    """
    n = len(indices)
    # Sums, and no means nor clip, which numpy has in Python.
    rows = gram[indices]
    products, squares = rows.sum(1) / len(gram), rows[:, indices]
    if weights is None:
        product, square = products.sum() / n, squares.sum() / n**2
    else:
        share = weights / n
        product, square = share @ products, share @ squares @ share
    squared_norm = gram.sum() / len(gram) ** 2
    error = square - 2 * product + squared_norm
    return product / squared_norm, (error + abs(error)) / 2


class StepQuality:
    """Averages over a run's steps what its selection is worth: :meth:`see` each step, and log what it returns.

    Averages are exponential ones (0.9 old, 0.1 new), numerators and denominators apart; of steps whose numbers are not
    finite none is taken in.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets another run."""
        #: ‖G‖², tr Σ, the picks' squared error, and the mean one of as many random picks.
        self._averages: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps."""
        return {} if self._averages is None else {"averages": [float(each) for each in self._averages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._averages = state["averages"] if state else None

    @torch.no_grad()
    def see(self, gram: torch.Tensor, picks: Picks) -> dict[str, float | torch.Tensor]:
        """Takes in a step, without waiting for a device.

        Args:
            gram (torch.Tensor): K of all M samples, shape (M, M), float64.
            picks (Picks): Fewer than M of them.

        Returns:
            dict[str, float | torch.Tensor]: ``step_length``, of this step. Averages: ``gradient_noise_scale``, a
            number of samples (NaN as long as ‖G‖² cannot be told from zero), and ``relative_error``, r: the picks'
            squared error relative to that of as many random ones. All are the last layer's.
        """
        m, n = len(gram), len(picks.indices)
        indices, weights = picks.indices.to(gram.device), picks.weights
        weights = None if weights is None else weights.to(gram)
        if gram.device.type != "cpu":
            length, error = step_error(gram, indices, weights)
            squared_norm, trace = gradient_noise(gram)
            # A random subset's expected squared error: sampling without replacement.
            now = torch.stack([squared_norm, trace, error, trace * (1 / n - 1 / m)])
            old = torch.zeros_like(now) if self._averages is None else torch.as_tensor(self._averages).to(now)
            averages = torch.where(now.isfinite().all(), (1 - _NEW) * old + _NEW * now, old)
            self._averages = averages
            norm, noise, of_picks, of_random = averages.unbind()
            scale: Any = torch.where(norm > 0, noise / norm, torch.nan)
            return {"step_length": length, "gradient_noise_scale": scale, "relative_error": of_picks / of_random}
        # As arrays: of so few numbers, what torch's operators cost is the calls.
        with np.errstate(all="ignore"):
            array = gram.numpy()
            length, error = step_error(array, indices.numpy(), None if weights is None else weights.numpy())
            squared_norm, trace = gradient_noise(array)
            seen = [float(each) for each in (squared_norm, trace, error, trace * (1 / n - 1 / m))]
        known = [0.0] * 4 if self._averages is None else [float(each) for each in self._averages]
        if all(map(math.isfinite, seen)):
            known = [(1 - _NEW) * old + _NEW * new for old, new in zip(known, seen, strict=True)]
        self._averages = known
        norm, noise, of_picks, of_random = known
        return {
            "step_length": float(length),
            "gradient_noise_scale": noise / norm if norm > 0 else math.nan,
            "relative_error": of_picks / of_random if of_random else math.nan,
        }
