"""How good a step on picks is, told from the minibatch's Gram matrix: its length, its error, and the gradient noise."""

from __future__ import annotations

from typing import Any

import torch

from composer_gradmatch.rules.picks import Picks

__all__ = ["StepQuality", "gradient_noise", "step_error"]

#: What a step's numbers count in their running averages.
_NEW = 0.1


def gradient_noise(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates the squared norm of the data's mean gradient and the trace of its samples' covariance, both unbiased.

    For samples that are drawn independently, products of different samples' gradients have the mean ‖G‖², and their
    squared norms the mean ‖G‖² + tr Σ (McCandlish et al., 2018, appendix A.1). tr Σ/‖G‖² is the gradient noise scale,
    a number of samples: minibatches that are much larger average over what is already known.

    Args:
        gram (torch.Tensor): K of last-layer gradients, shape (M, M), M > 1. So it is the last layer's noise.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: ‖G‖², which may come out negative where noise prevails, and tr Σ.
    """
    m = len(gram)
    trace = gram.diagonal().sum()
    squared_norm = (gram.sum() - trace) / (m * (m - 1))
    return squared_norm, trace / m - squared_norm


def step_error(gram: torch.Tensor, picks: Picks) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares the weighted mean gradient of picks with that of the minibatch, in the last layer.

    Args:
        gram (torch.Tensor): K, shape (M, M).
        picks (Picks): n picks.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: The step length ⟨(1/n)Σwᵢgᵢ, ḡ⟩/‖ḡ‖², which is 1 for a step as long as the
        minibatch's, and the squared error ‖(1/n)Σwᵢgᵢ − ḡ‖².
    """
    indices = picks.indices.to(gram.device)
    n = len(indices)
    target = gram.mean(1)
    share = gram.new_full((n,), 1 / n) if picks.weights is None else picks.weights.to(gram) / n
    rows = gram.index_select(0, indices)
    product, squared_norm = share @ target.index_select(0, indices), target.mean()
    error = share @ rows.index_select(1, indices) @ share - 2 * product + squared_norm
    return product / squared_norm, error.clamp(min=0)


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
        self._averages: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps."""
        return {} if self._averages is None else {"averages": self._averages.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._averages = torch.tensor(state["averages"], dtype=torch.float64) if state else None

    @torch.no_grad()
    def see(self, gram: torch.Tensor, picks: Picks) -> dict[str, torch.Tensor]:
        """Takes in a step, without waiting for a device.

        Args:
            gram (torch.Tensor): K of all M samples, shape (M, M), float64.
            picks (Picks): Fewer than M of them.

        Returns:
            dict[str, torch.Tensor]: Scalars. ``step_length``, of this step. Averages: ``gradient_noise_scale``, a
            number of samples (NaN as long as ‖G‖² cannot be told from zero), and ``relative_error``, r: the picks'
            squared error relative to that of as many random ones. All are the last layer's.
        """
        m, n = len(gram), len(picks.indices)
        length, error = step_error(gram, picks)
        squared_norm, trace = gradient_noise(gram)
        # A random subset's expected squared error: sampling without replacement.
        now = torch.stack([squared_norm, trace, error, trace * (1 / n - 1 / m)])
        if self._averages is None:
            self._averages = torch.zeros_like(now)
        old = self._averages = self._averages.to(now.device)
        self._averages = torch.where(now.isfinite().all(), (1 - _NEW) * old + _NEW * now, old)
        norm, noise, of_picks, of_random = self._averages.unbind()
        return {
            "step_length": length,
            "gradient_noise_scale": torch.where(norm > 0, noise / norm, torch.nan),
            "relative_error": of_picks / of_random,
        }
