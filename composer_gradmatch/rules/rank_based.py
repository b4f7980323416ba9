"""Rank-based selection: the sampling of Loshchilov and Hutter (2015), within the minibatch."""

from __future__ import annotations

import math

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.loss_percentiles import select_by_percentile
from composer_gradmatch.rules.picks import Picks
from composer_gradmatch.rules.scores import by_descending, check_num_picks

__all__ = ["RankBased"]


class RankBased:
    """Draws samples with probabilities that fall exponentially with the rank of their losses.

    Of ranks i = 1 (the largest loss) to M, the probability of a draw is pᵢ ∝ exp(−log(sₑ)·i/M), as in
    Loshchilov and Hutter (2015, "Online batch selection for faster training of neural networks"). What differs: they
    rank the whole data set by each sample's latest known loss, which may be epochs old, and here a minibatch is ranked
    by its losses now; they draw with replacement, here samples are drawn one after the other without; and they lower
    sₑ from 100 to 1 in the course of training, here it is constant. As theirs, the picks have no weights, so that high
    losses are favoured. It needs losses, and costs O(M log M).

    Args:
        pressure (float, optional): The selection pressure sₑ ≥ 1, the ratio of the largest probability to the smallest
            (but for a factor sₑ^(1/M)); 1 draws uniformly. Default: ``100.0``.

    Raises:
        ValueError: If the pressure is out of range.
    """

    def __init__(self, *, pressure: float = 100.0) -> None:
        if not 1 <= pressure < float("inf"):
            raise ValueError(
                f"pressure must be a number >= 1, the ratio of the largest loss's probability to that of the smallest "
                f"(1 draws uniformly); got {pressure}."
            )
        self.pressure = pressure

    def __call__(self, candidates: Candidates, m: int) -> Picks:
        """Draws m samples; the ranks of equal losses are drawn, too.

        Args:
            candidates (Candidates): With finite losses.
            m (int): The number of picks.
        """
        num_samples = candidates.num_samples
        check_num_picks(m, num_samples)
        order = by_descending(candidates.losses)
        ranks = torch.arange(1, num_samples + 1, dtype=torch.float64)
        return Picks(order[select_by_percentile((-ranks / num_samples).exp(), m, math.log(self.pressure))])
