"""The samples with the largest losses."""

from __future__ import annotations

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.rules.scores import largest

__all__ = ["top_loss"]


def top_loss(candidates: Candidates, m: int) -> Picks | WholeBatch:
    """Picks the m samples with the largest losses: Ordered SGD (Kawaguchi and Lu, 2020).

    Their mean gradient is not that of the minibatch, whose high losses it descends instead; wrong labels are the first
    to be picked. It needs losses, and costs O(M log M).

    Args:
        candidates (Candidates): With finite losses.
        m (int): The number of picks.

    Returns:
        Picks | WholeBatch: The minibatch whole where all losses are zero; of equal losses, which is drawn.
    """
    return largest(candidates.losses, m)
