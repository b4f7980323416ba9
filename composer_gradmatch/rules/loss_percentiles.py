"""Loss-based selection: the sampling of Jiang et al. (2019), in Composer's variant and with their history."""

from __future__ import annotations

from typing import Any

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks

__all__ = ["LossPercentiles", "loss_percentiles", "select_by_percentile"]


def loss_percentiles(losses: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """Computes CDF(l) of each loss under the empirical distribution of a history, at the middle of its steps.

    With the losses themselves as the history these are the (rank + ½)/M of Composer's ``SelectiveBackprop``,
    but for equal losses, which share theirs.

    Args:
        losses (torch.Tensor): Shape (M,).
        history (torch.Tensor): Shape (R,), R > 0.

    Returns:
        torch.Tensor: Values in [0, 1], float64, shape (M,); positive for a loss that is part of the history.
    """
    ordered = history.sort().values
    below = torch.searchsorted(ordered, losses, side="left")
    up_to = torch.searchsorted(ordered, losses, side="right")
    return (below + up_to).double() / (2 * len(history))


def select_by_percentile(percentiles: torch.Tensor, num_picks: int, beta: float) -> torch.Tensor:
    """Picks samples without replacement with probabilities in proportion to percentile^β, with torch's generator.

    The largest of β·log(percentile) + Gumbel noise are a sequential draw without replacement, and unlike the
    probabilities themselves they do not underflow for large β.

    Args:
        percentiles (torch.Tensor): Values in (0, 1], shape (M,).
        num_picks (int): m, at most M.
        beta (float): The selectivity β ≥ 0; 0 is uniform sampling.

    Returns:
        torch.Tensor: The picks in the order drawn, int64, shape (m,).
    """
    noise = -torch.empty(len(percentiles), dtype=torch.float64).exponential_().log()
    return torch.topk(beta * percentiles.double().log() + noise, num_picks).indices


class LossPercentiles:
    """Draws samples in favour of high losses, by their rank in the minibatch or among recent losses.

    Args:
        beta (float, optional): The selectivity β ≥ 0; None for M/m − 1, which makes the mean probability of a sample
            m/M. Default: ``None``.
        history (int, optional): R, the number of recent losses to rank by; 0 ranks within the minibatch.
            Default: ``0``.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(self, *, beta: float | None = None, history: int = 0) -> None:
        if beta is not None and not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be a number >= 0 (0 draws uniformly) or None for 1/keep - 1; got {beta}.")
        if isinstance(history, bool) or not isinstance(history, int) or history < 0:
            raise ValueError(
                f"history must be an integer >= 0, the number of recent losses to rank by; got {history!r}."
            )
        self.beta, self.history = beta, history
        self.reset()

    def reset(self) -> None:
        """Forgets the losses of another run."""
        #: The R most recent losses seen on this rank, float64.
        self.recent = torch.empty(0, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps: the recent losses, if they are ranked by."""
        return {"recent": self.recent} if self.history else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        if self.history and "recent" in state:
            self.recent = state["recent"][-self.history :]

    def __call__(self, candidates: Candidates, m: int) -> Picks:
        """Draws m samples.

        Args:
            candidates (Candidates): With finite losses.
            m (int): The number of picks.
        """
        losses, num_samples = candidates.losses.to("cpu", torch.float64), candidates.num_samples
        beta = num_samples / m - 1 if self.beta is None else self.beta
        if not self.history:
            order = torch.argsort(losses)
            ranks = torch.arange(0.5, num_samples, dtype=torch.float64) / num_samples
            return Picks(order[select_by_percentile(ranks, m, beta)])
        # A minibatch larger than R is ranked within itself: each of its losses belongs to the distribution.
        recent = torch.cat([self.recent, losses])[-max(self.history, num_samples) :]
        self.recent = recent[-self.history :]
        return Picks(select_by_percentile(loss_percentiles(losses, recent), m, beta))
