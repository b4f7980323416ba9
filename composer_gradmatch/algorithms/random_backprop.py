"""Random selection: the baseline that gradient matching and loss-based selection have to beat."""

from __future__ import annotations

import torch
from composer.core import State

from composer_gradmatch.algorithms.subset_backprop import Picks, SubsetBackprop

__all__ = ["RandomBackprop", "select_at_random"]


def select_at_random(num_samples: int, num_picks: int) -> torch.Tensor:
    """Picks samples uniformly without replacement, with torch's generator.

    Args:
        num_samples (int): M.
        num_picks (int): m, at most M.

    Returns:
        torch.Tensor: The picks, int64, shape (m,).
    """
    return torch.randperm(num_samples)[:num_picks]


class RandomBackprop(SubsetBackprop):
    """Backpropagates a uniformly random part of each minibatch, without a selection pass (§5 of the paper).

    It costs m/M of a step where the selecting strategies cost (M/3 + m)/M, and neither of them reliably beats it.

    Args:
        start (float, optional): Start of selection as a fraction of training. Default: ``0.5``.
        end (float, optional): End of selection as a fraction of training. Default: ``0.9``.
        keep (float, optional): Fraction of the minibatch to keep, m = max(1, int(keep·M)). Default: ``0.5``.
        interrupt (int, optional): Every ``interrupt``-th batch is trained whole; 0 selects from all.
            Default: ``2``.
        input_key (str | int | tuple[Callable, Callable] | Any, optional): Where a batch has its inputs.
            Default: ``0``.
        target_key (str | int | tuple[Callable, Callable] | Any, optional): Where a batch has its targets.
            Default: ``1``.
        clock (str, optional): ``"batch"`` counts batches within an epoch, too, for ``start`` and ``end``; see
            :class:`.SubsetBackprop`. Default: ``"duration"``.

    Raises:
        ValueError: If a value is out of range.

    Example:
        .. code-block:: python

            trainer = Trainer(..., algorithms=[RandomBackprop(start=0.0, end=1.0, keep=0.3, interrupt=0)])
    """

    log_name = "random_backprop"

    def _select(self, state: State, num_samples: int, num_picks: int) -> Picks:
        return Picks(select_at_random(num_samples, num_picks))
