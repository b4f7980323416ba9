"""Importance sampling without replacement: samples drawn by a bound on their gradients' norms, and unbiased weights."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost_switch import CostSwitch, Switch, excess_variance
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.rules.scores import check_num_picks, per_sample_norms
from composer_gradmatch.rules.step_quality import gradient_noise
from composer_gradmatch.rules.uniform import select_at_random

__all__ = ["ImportanceSampling", "Score", "inclusion_probabilities", "systematic_sample"]

#: What samples are drawn in proportion to: sᵢ = √Kᵢᵢ of the last layer, ‖pᵢ‖ at its output, or √ℓᵢ.
Score = Literal["gradient_norm", "output_gradient", "loss"]


def inclusion_probabilities(scores: torch.Tensor, num_picks: int) -> torch.Tensor:
    """Finds qᵢ = min(1, c·sᵢ) with Σq = m.

    Args:
        scores (torch.Tensor): s ≥ 0, finite, shape (M,).
        num_picks (int): m, 1 ≤ m ≤ M.

    Returns:
        torch.Tensor: q, float64, shape (M,). Where no more than m scores are positive, 1 for those and 0 for the rest.

    Raises:
        ValueError: If m is out of range or a score is negative or not finite.
    """
    scores = scores.double()
    check_num_picks(num_picks, len(scores))
    if not bool((scores >= 0).all() & scores.isfinite().all()):
        raise ValueError("scores must be finite numbers >= 0.")
    if int((scores > 0).sum()) <= num_picks:
        return (scores > 0).double()
    ordered = (scores / scores.max()).sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)
    # With the k largest at 1, c = (m − k)/(sum of the rest): k is the first for which that caps no other.
    left = num_picks - torch.arange(len(ordered), dtype=torch.float64)
    capped = int((ordered * left <= rest).nonzero()[0])
    return (scores / scores.max() * (left[capped] / rest[capped])).clamp(max=1)


def systematic_sample(inclusion: torch.Tensor) -> torch.Tensor:
    """Draws samples with given inclusion probabilities, as many as these sum to: Madow's systematic sampling (1949).

    One uniform offset, and steps of one through the cumulated probabilities of the samples in random order, with
    torch's generator.

    Args:
        inclusion (torch.Tensor): q in [0, 1], shape (M,), with a sum that is a whole number, up to rounding.

    Returns:
        torch.Tensor: Indices, int64, ascending.
    """
    size = int(inclusion.sum().round())
    order = torch.randperm(len(inclusion))
    order = order[inclusion[order] > 0]
    reached = inclusion[order].cumsum(0)
    if not len(order):
        return order
    reached = reached * (size / reached[-1])
    positions = torch.rand((), dtype=torch.float64) + torch.arange(size, dtype=torch.float64)
    at = torch.searchsorted(reached, positions, right=True).clamp(max=len(order) - 1)
    return order[at.unique()].sort().values


class ImportanceSampling:
    """Draws samples in proportion to a score and weighs them so that the mean gradient is unbiased.

    Inclusion probabilities are qᵢ = min(1, c·sᵢ), weights n/(M·qᵢ): not clipped, not normalised (Alain et al., 2015;
    Csiba and Richtárik, 2018; Katharopoulos and Fleuret, 2018). In steps in which that is not predicted to have less
    variance than a random subset of the same cost, it looks at nothing and trains that subset: see
    :class:`.CostSwitch`. Costs O(M log M) beside the look.

    Args:
        score (str, optional): s: ``"gradient_norm"``, of the last layer, which is the best; ``"output_gradient"``, the
            norm of the gradient at its output; or ``"loss"``, √ℓ, of losses that are not negative.
            Default: ``"gradient_norm"``.
        switch (str, optional): ``"cost"`` or ``"always"``. Default: ``"cost"``.

    Raises:
        ValueError: If there is no such score or switch.
    """

    def __init__(self, *, score: Score = "gradient_norm", switch: Switch = "cost") -> None:
        for name, value, kind in (("score", score, Score), ("switch", switch, Switch)):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(kind)))}; got {value!r}.")
        self.score: Score = score
        self.switch = CostSwitch(switch)
        #: Whether :meth:`see_training` asks for losses.
        self.reads_losses = score == "loss"

    @property
    def decides(self) -> bool:
        """Whether there is anything to decide on."""
        return self.switch.kind == "cost"

    @property
    def looks(self) -> bool:
        """Whether the next minibatch is to be looked at; if not, the rule is given more picks, at the same cost."""
        return self.switch.is_on

    def reset(self) -> None:
        """Forgets another run."""
        self.switch.reset()

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps: the switch's state."""
        return self.switch.state_dict() if self.decides else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        if state and self.decides:
            self.switch.load_state_dict(state)

    def __call__(self, candidates: Candidates, m: int) -> Picks | WholeBatch:
        """Draws m samples.

        Args:
            candidates (Candidates): With gradients (or losses, for a score of losses that is always on), if it looks.
            m (int): The number of picks.

        Returns:
            Picks | WholeBatch: The minibatch whole where all scores are zero, or a loss is negative.
        """
        if not self.looks:
            return Picks(select_at_random(candidates.num_samples, m), metrics=self.switch.metrics())
        scores = self._scores(candidates)
        if not bool(scores.isfinite().all()):
            return WholeBatch("a minibatch has negative losses, whose root is no score; it is trained whole.")
        if not bool(scores.any()):
            return WholeBatch(
                "a minibatch has samples with the score zero only; it and others like it are trained whole."
            )
        inclusion = inclusion_probabilities(scores, m)
        metrics = self.switch.metrics() if self.decides else {}
        if self.decides:
            self._see(candidates.gram, inclusion)
        indices = systematic_sample(inclusion)
        weights = len(indices) / (candidates.num_samples * inclusion[indices])
        return Picks(indices, weights, metrics)

    def see_training(self, candidates: Candidates, keep: float) -> None:
        """Takes in what the training step has shown of random samples; gradients may be off by a common factor.

        Args:
            candidates (Candidates): The samples of the step.
            keep (float): m/M, of steps that look.
        """
        scores = self._scores(candidates)
        if candidates.num_samples > 1 and bool(scores.isfinite().all()) and bool(scores.any()):
            m = max(1, round(keep * candidates.num_samples))
            self._see(candidates.gram, inclusion_probabilities(scores, m))

    def findings(self) -> tuple[float, float]:
        """Gives what is to be summed over ranks: see :class:`.CostSwitch`."""
        return self.switch.findings()

    def decide(self, findings: tuple[float, float], cost: float) -> None:
        """Decides on the next step: see :class:`.CostSwitch`."""
        self.switch.decide(findings, cost)

    def _scores(self, candidates: Candidates) -> torch.Tensor:
        """Gives s on the host, float64; NaN where a loss is negative."""
        if self.score == "loss":
            return candidates.losses.detach().cpu().double().sqrt()
        if self.score == "gradient_norm":
            return candidates.gram.diagonal().clamp(min=0).sqrt().cpu().double()
        return per_sample_norms(candidates.output_grads, candidates.num_samples, candidates.counts).cpu()

    def _see(self, gram: torch.Tensor, inclusion: torch.Tensor) -> None:
        if len(gram) > 1:
            self.switch.see(excess_variance(gram.diagonal().cpu().double(), inclusion, gradient_noise(gram)[1].cpu()))
