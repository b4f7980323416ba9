"""How many samples a training step must have: for batch normalisation, and so that ranks stay in step.

Picks may come out few: of a small last minibatch, or where matching stops early. Batch normalisation takes no single
sample (where its maps have one pixel), and where each microbatch is one of all ranks these must make as many of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from composer.core import State

from composer_gradmatch.rules.picks import Picks

__all__ = ["enough_samples", "fill_up", "num_microbatches", "smallest_microbatch"]


def num_microbatches(num_samples: int, microbatch_size: float | None) -> int:
    """Counts the microbatches that Composer splits samples into.

    Args:
        num_samples (int): The samples of a batch.
        microbatch_size (float, optional): The run's ``device_train_microbatch_size``.
    """
    return -(-num_samples // max(1, int(microbatch_size or num_samples)))


def smallest_microbatch(num_samples: int, microbatch_size: float | None) -> int:
    """Tells the size of the smallest microbatch that Composer splits samples into.

    Args:
        num_samples (int): The samples of a batch.
        microbatch_size (float, optional): The run's ``device_train_microbatch_size``.
    """
    if microbatch_size is None or microbatch_size >= num_samples:
        return num_samples
    size = max(1, int(microbatch_size))
    return num_samples % size or size


def enough_samples(num_picks: int, num_samples: int, state: State, fewest: int, microbatches: int = 1) -> int:
    """Finds the smallest number of samples, at least the picks', that makes microbatches that are large enough.

    Args:
        num_picks (int): n, the picks.
        num_samples (int): M; more there are not.
        state (State): The run's state, with the size of its microbatches.
        fewest (int): The fewest samples of a microbatch.
        microbatches (int, optional): The fewest microbatches. Default: ``1``.

    Returns:
        int: The number; n where even M samples do not make it.
    """
    size = state.device_train_microbatch_size
    size = None if size is None else float(size)
    for n in range(num_picks, num_samples + 1):
        if smallest_microbatch(n, size) >= fewest and num_microbatches(n, size) >= microbatches:
            return n
    return num_picks


def fill_up(
    selection: Picks,
    num_samples: int,
    wanted: int,
    growth: float | None = None,
    last: torch.Tensor | None = None,
) -> Picks:
    """Adds samples that were not picked: to picks with weights, with weight zero; to others as picks of their own.

    The other weights grow, so that the weighted mean over all of them is what it was.

    Args:
        selection (Picks): n picks of M samples.
        num_samples (int): M.
        wanted (int): The number of samples to come to, at least n.
        growth (float, optional): What to multiply the weights by, where the mean is over more than these samples (over
            those of all ranks); None for wanted/n. Default: ``None``.
        last (torch.Tensor, optional): Samples to add only where there are no others, int64. Default: ``None``.

    Returns:
        Picks: With its weights and those of the samples that were added.
    """
    n = len(selection.indices)
    growth = wanted / n if growth is None else growth
    if wanted == n and growth == 1:
        return selection
    taken = torch.zeros(num_samples, dtype=torch.bool)
    taken[selection.indices.cpu()] = True
    late = torch.zeros_like(taken)
    if last is not None:
        late[last.cpu()] = True
    order = torch.cat([(~taken & ~late).nonzero(), (~taken & late).nonzero()]).flatten()
    more = order[: wanted - n].to(selection.indices.device)
    indices, weights = torch.cat([selection.indices, more]), selection.weights
    if weights is not None:
        weights = torch.cat([weights * growth, weights.new_zeros(wanted - n)])
    return replace(selection, indices=indices, weights=weights)
