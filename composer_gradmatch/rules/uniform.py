"""Random selection: the baseline that every other rule has to beat at the same cost."""

from __future__ import annotations

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks

__all__ = ["select_at_random", "uniform"]


def select_at_random(num_samples: int, num_picks: int) -> torch.Tensor:
    """Picks samples uniformly without replacement, with torch's generator.

    Args:
        num_samples (int): M.
        num_picks (int): m, at most M.

    Returns:
        torch.Tensor: The picks, int64, shape (m,).
    """
    return torch.randperm(num_samples)[:num_picks]


def uniform(candidates: Candidates, m: int) -> Picks:
    """Picks m samples at random and looks at none (§5 of Balles et al., 2023).

    Args:
        candidates (Candidates): Their number is enough.
        m (int): The number of picks.
    """
    return Picks(select_at_random(candidates.num_samples, m))
