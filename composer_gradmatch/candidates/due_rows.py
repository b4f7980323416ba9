"""Which rows of a minibatch a look is made at: those that are due, and others where a pass takes no fewer."""

from __future__ import annotations

import torch
from composer.core import State

from composer_gradmatch.forward.batch_norm import fewest_in_a_microbatch
from composer_gradmatch.forward.composer_private import ghost_batch_size
from composer_gradmatch.forward.ranks import largest_on_all_ranks, needs_all_ranks, unwrap
from composer_gradmatch.forward.selection_pass import SelectionPass

__all__ = ["rows_to_look_at"]


def rows_to_look_at(
    state: State, due: torch.Tensor, stamps: torch.Tensor, selection_pass: SelectionPass, for_batch_norm: int
) -> torch.Tensor:
    """Lists the rows that are due, and the oldest of the others where a pass must have more.

    Args:
        state (State): The run's state.
        due (torch.Tensor): Whether each of the minibatch's samples is, boolean, shape (M,).
        stamps (torch.Tensor): When they were looked at, shape (M,).
        selection_pass (SelectionPass): Makes the look.
        for_batch_norm (int): The fewest rows in a model with batch normalisation.

    Returns:
        torch.Tensor: int64, ascending.
    """
    wanted, model = int(due.sum()), unwrap(state.model)
    if needs_all_ranks(model) and largest_on_all_ranks(int(wanted > 0), state.device):
        wanted = max(1, wanted)  # A forward pass is one of all ranks.
    if wanted and (fewest := fewest_in_a_microbatch(model)) > 1:
        fewest = max(fewest, ghost_batch_size(model))
        wanted = max(wanted, for_batch_norm, fewest)
        while wanted < len(due) and selection_pass.smallest_microbatch(state, wanted) < fewest:
            wanted += 1
        wanted = min(wanted, len(due))
    oldest = stamps.argsort(stable=True)
    # What is due is the oldest, but for stamps of the future.
    order = torch.cat([oldest[due[oldest]], oldest[~due[oldest]]])
    return order[:wanted].sort().values
