"""InfoBatch: a random part of the samples with low losses is left out, and the rest of them counts for it."""

from __future__ import annotations

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks
from composer_gradmatch.rules.scores import at_most, check_num_picks

__all__ = ["InfoBatch"]


class InfoBatch:
    """Keeps all samples with a loss of at least the mean, and a random part of the others with larger weights.

    Of the L samples below the mean, k = round((1 − r)·L) are kept, but at least one, and each counts L/k times, so that
    the mean gradient is unbiased: Qin et al. (ICLR 2024, "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic
    Data Pruning", §2.2, eq. 3; their weight is 1/(1 − r)). The number of picks n follows from the losses. ``keep`` is
    its upper bound: where n > m, m of them are drawn at random, with weights that stay unbiased. As in the paper
    there is none with ``keep=1``. What differs: the paper prunes the data set once an epoch by the losses of the last
    one, so that there are fewer steps of the same size; here each minibatch is pruned by the mean of its own losses, so
    that there are as many steps of fewer samples. Losses of earlier epochs are those of ``refresh``; the paper trains
    on everything in the last eighth of the epochs (δ = 0.875), which is ``end=0.875``. On several
    processes each prunes its part by the mean of that, and counts by its number of picks. It needs losses, and costs
    O(M).

    Args:
        prune (float, optional): r, the share of the samples with low losses to leave out, in [0, 1). Default: ``0.5``.

    Raises:
        ValueError: If ``prune`` is out of range.
    """

    def __init__(self, *, prune: float = 0.5) -> None:
        if not 0 <= prune < 1:
            raise ValueError(
                f"prune must be in [0, 1), the share of the samples with losses below the mean to leave out; got "
                f"{prune}."
            )
        self.prune = prune

    def __call__(self, candidates: Candidates, m: int) -> Picks:
        """Draws at most m samples, with torch's generator.

        Args:
            candidates (Candidates): With finite losses.
            m (int): The most picks.

        Returns:
            Picks: With weights (n/M)·bᵢ, of the n picks before the bound, where bᵢ is 1 or L/k; and the metric
            ``fraction_left``, n/M.

        Raises:
            ValueError: If m is out of range.
        """
        num_samples = candidates.num_samples
        check_num_picks(m, num_samples)
        losses = candidates.losses.to("cpu", torch.float64)
        # The mean of equal losses may be rounded to above them.
        is_low = losses < min(losses.mean(), losses.max())
        low = is_low.nonzero()[:, 0]
        kept = max(1, round((1 - self.prune) * len(low))) if len(low) else 0
        counts_for = torch.ones(num_samples, dtype=torch.float64)
        counts_for[low] = len(low) / max(1, kept)
        indices = torch.cat([(~is_low).nonzero()[:, 0], low[torch.randperm(len(low))[:kept]]])
        share = len(indices) / num_samples
        indices = at_most(indices, m)
        return Picks(indices, share * counts_for[indices], {"fraction_left": share})
