"""Whether looking at a minibatch pays: decided from step to step, by what it costs and what it saves."""

from __future__ import annotations

from typing import Any, Literal

import torch

__all__ = ["CostSwitch", "Switch", "excess_variance"]

#: ``"cost"`` looks only where that is predicted to pay, ``"always"`` in every step.
Switch = Literal["cost", "always"]

#: What a step counts in the running average.
_NEW = 0.1
#: After how many steps that have shown nothing it looks again.
_BLIND = 20


def excess_variance(squared_norms: torch.Tensor, inclusion: torch.Tensor, variance: torch.Tensor) -> float | None:
    """Tells how much more variance sampling with some inclusion probabilities leaves than the minibatch itself has.

    Of M samples with the inclusion probabilities q the mean gradient's estimate has the variance V/M of the minibatch
    and Σᵢ(1/qᵢ − 1)sᵢ²/M² of the sampling (as of independent draws; Katharopoulos and Fleuret, 2018, for draws with
    replacement). This is the second relative to the first.

    Args:
        squared_norms (torch.Tensor): s², the diagonal of K, shape (M,).
        inclusion (torch.Tensor): q, shape (M,); zero only where s is.
        variance (torch.Tensor): V, the trace of the gradients' covariance, a scalar.

    Returns:
        float | None: The ratio, at least 0; None if it cannot be told.
    """
    odds = torch.where(inclusion > 0, 1 / inclusion - 1, torch.where(squared_norms > 0, torch.inf, 0.0))
    spread = torch.where(odds > 0, odds * squared_norms, 0.0).mean()
    ratio = float(spread / variance) if float(variance) > 0 else float("nan")
    return ratio if 0 <= ratio < float("inf") else None


class CostSwitch:
    """Is on where sampling by a score has less variance than a random subset of the same cost.

    A step that looks costs c of a full one and leaves the variance V/M·(1 + e), e as :func:`excess_variance` has it; a
    random subset of the same cost, V/(cM). So it is on iff c·(1 + e) < 1, e averaged over steps (0.9 old, 0.1 new). It
    begins by looking, and looks again after 20 steps that have shown nothing.

    Args:
        kind (str): See :data:`Switch`.
    """

    def __init__(self, kind: Switch) -> None:
        self.kind = kind
        self.reset()

    def reset(self) -> None:
        """Forgets another run."""
        self.is_on = True
        self._excess: float | None = None
        self._steps = self._steps_on = self._blind = 0
        #: Of the step that is being made.
        self._seen: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps."""
        counts = {"steps": self._steps, "steps_on": self._steps_on, "blind": self._blind}
        return {"is_on": self.is_on, "excess": self._excess, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.is_on, self._excess = state["is_on"], state["excess"]
        self._steps, self._steps_on, self._blind = state["steps"], state["steps_on"], state["blind"]

    def see(self, excess: float | None) -> None:
        """Takes in what a step has shown on this rank.

        Args:
            excess (float, optional): Of :func:`excess_variance`.
        """
        self._seen = excess

    def findings(self) -> tuple[float, float]:
        """Gives what is to be summed over ranks, so that all decide alike, and begins a new step."""
        found = (0.0, 0.0) if self._seen is None else (self._seen, 1.0)
        self._seen = None
        return found

    def decide(self, findings: tuple[float, float], cost: float) -> None:
        """Decides on the next step.

        Args:
            findings (tuple[float, float]): The sum of what :meth:`findings` gave on all ranks.
            cost (float): c, what a step that looks costs, in steps on the whole minibatch.
        """
        self._steps, self._steps_on = self._steps + 1, self._steps_on + self.is_on
        total, count = findings
        self._blind = 0 if count else self._blind + 1
        if count:
            now = total / count
            self._excess = now if self._excess is None else (1 - _NEW) * self._excess + _NEW * now
        if self.kind == "cost" and self._excess is not None:
            self.is_on = cost * (1 + self._excess) < 1 or self._blind >= _BLIND

    def metrics(self) -> dict[str, float]:
        """Tells what to log: whether the step is on, the share of steps that were, and the average of e."""
        steps = self._steps + 1
        share = {"looked": float(self.is_on), "share_of_steps_on": (self._steps_on + self.is_on) / steps}
        return share if self._excess is None else {**share, "excess_variance": self._excess}
