"""As many samples in a step as its model needs, and as many microbatches on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from composer.core import State
from composer.utils import dist
from torch.nn.parallel import DistributedDataParallel

from composer_gradmatch.algorithms.enough_samples import (
    enough_samples,
    fill_up,
    num_microbatches,
    smallest_microbatch,
)
from composer_gradmatch.forward.batch_norm import fewest_in_a_microbatch
from composer_gradmatch.forward.composer_private import ghost_batch_size
from composer_gradmatch.forward.ranks import largest_on_all_ranks, needs_all_ranks, sum_on_all_ranks, unwrap
from composer_gradmatch.rules.picks import Picks, WholeBatch

__all__ = ["RanksInStep", "on_all_ranks"]


def on_all_ranks(check: Callable[[], None], owner: str) -> None:
    """Runs a check of the first batch; what it raises on one rank is raised on all, which would else wait for it.

    Where a forward pass is one of all ranks and fails on one of them, the others wait all the same.

    Args:
        check (Callable): The check.
        owner (str): The algorithm that it is for, for the message on the other ranks.

    Raises:
        RuntimeError: If it failed on another rank.
    """
    error: Exception | None = None
    try:
        check()
    except Exception as caught:
        if dist.get_world_size() == 1:
            raise
        error = caught
    if dist.get_world_size() == 1:
        return
    messages = dist.all_gather_object(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"{owner} failed on rank {rank}: {message}")


class RanksInStep:
    """Fills picks up, so that each rank's step can be made, and all of them together."""

    def __init__(self) -> None:
        self.reset_fit()

    def reset_fit(self) -> None:
        """Forgets what belongs to one ``fit``."""
        #: Asked for once, as that reads the environment.
        self._alone = dist.get_world_size() == 1
        self._ghost_batch_size = 1
        #: Whether gradients were seen here not to be synchronised in each microbatch, and whether on any rank.
        self._saw_one_sync = self._syncs_once = False
        #: The most samples of the ranks' first batches.
        self._largest_batch = 0
        #: The samples of the step, until its first forward pass.
        self._step_size: int | None = None

    def see_first_batch(self, state: State, num_samples: int) -> None:
        """Takes note of the ranks' first batches."""
        self._largest_batch = num_samples if self._alone else largest_on_all_ranks(num_samples, state.device)

    def check_ghost_batches(self, state: State, num_samples: int, keep: float, owner: str) -> None:
        """Raises on the run's first batch, which is a full one, if ``GhostBatchNorm`` cannot take its picks.

        Args:
            state (State): The run's state.
            num_samples (int): M.
            keep (float): The share to keep.
            owner (str): The algorithm that it is for, for the message.

        Raises:
            ValueError: If a microbatch of picks is smaller than a ghost batch.
        """
        self._ghost_batch_size = ghost_batch_size(unwrap(state.model))
        num_picks = max(1, int(keep * num_samples))
        smallest = smallest_microbatch(num_picks, state.device_train_microbatch_size)
        if int(state.timestamp.batch) == 0 and smallest < self._ghost_batch_size:
            raise ValueError(
                f"{owner} with keep={keep} picks {num_picks} of {num_samples} samples, which makes "
                f"a microbatch of {smallest}, but GhostBatchNorm takes at least "
                f"ghost_batch_size={self._ghost_batch_size} samples at once. Lower ghost_batch_size, raise keep or "
                "the batch size, or choose a device_train_microbatch_size that leaves no smaller rest."
            )

    def num_picks(self, state: State, num_samples: int, keep: float) -> int:
        """Counts the picks: m = max(1, int(keep·M)), and more where batch normalisation cannot take as few."""
        num_picks = max(1, int(keep * num_samples))
        return enough_samples(num_picks, num_samples, state, self._fewest(state, num_picks))

    def _fewest(self, state: State, num_picks: int) -> int:
        """Gives the fewest samples of a microbatch, looked for only where they could be too few."""
        smallest = smallest_microbatch(num_picks, state.device_train_microbatch_size)
        if smallest >= max(2, self._ghost_batch_size):
            return 1
        return max(self._ghost_batch_size, fewest_in_a_microbatch(unwrap(state.model)))

    def with_enough_samples(
        self, state: State, picks: Picks | WholeBatch, num_samples: int, last: torch.Tensor | None = None
    ) -> Picks | WholeBatch:
        """Fills picks up where their step needs more samples; takes the minibatch whole where it has not as many.

        Args:
            state (State): The run's state.
            picks (Picks | WholeBatch): What was selected of the minibatch.
            num_samples (int): M.
            last (torch.Tensor, optional): Samples that are added only where there are no others. Default: ``None``.
        """
        size = state.device_train_microbatch_size
        picked = len(picks.indices) if isinstance(picks, Picks) else num_samples
        fewest = self._fewest(state, picked)
        in_step, growth = self.stay_in_step(state), 1.0
        if not in_step and smallest_microbatch(picked, size) >= fewest:
            return picks
        microbatches = num_microbatches(picked, size)
        if in_step:
            microbatches = largest_on_all_ranks(microbatches, state.device)
        wanted = enough_samples(picked, num_samples, state, fewest, microbatches)
        fits = (
            smallest_microbatch(wanted, size) >= fewest and num_microbatches(wanted, size) == microbatches
        ) or picked == num_samples
        if in_step:
            fits = largest_on_all_ranks(int(not fits), state.device) == 0
            self._syncs_once = largest_on_all_ranks(int(self._saw_one_sync), state.device) > 0
            growth = sum_on_all_ranks(wanted, state.device) / sum_on_all_ranks(picked, state.device)
        if isinstance(picks, WholeBatch):
            return picks
        if not fits:
            return WholeBatch(
                "a minibatch has too few samples to make the microbatches that its model, or the other ranks, need; "
                "it and others like it are trained whole."
            )
        if not in_step:
            return fill_up(picks, num_samples, wanted, last=last)
        # The Trainer's mean is over the samples of all ranks.
        return fill_up(picks, num_samples, wanted, growth, last)

    def stay_in_step(self, state: State) -> bool:
        """Tells whether all ranks must make the same number of microbatches.

        For forward passes that are ones of all ranks (FSDP, SyncBatchNorm), and where gradients are synchronised in
        each microbatch (Composer's default with algorithms that leave parameters without a gradient). Which it is, is
        seen in the first step of several microbatches; until then they do.
        """
        if self._alone:
            return False
        if needs_all_ranks(unwrap(state.model)):
            return True
        if not isinstance(state.model, DistributedDataParallel) or self._syncs_once:
            return False
        size = state.device_train_microbatch_size
        return size is not None and size < self._largest_batch

    @property
    def watches_step(self) -> bool:
        """Whether the step's first forward pass is still to be seen."""
        return self._step_size is not None

    def begin_step(self, num_samples: int) -> None:
        """Takes note of the samples that a step is made of, where it is one of several ranks."""
        self._step_size = None if self._alone else num_samples

    def see_forward(self, state: State, num_samples: Callable[[], int]) -> None:
        """Sees, before a step's first forward pass, whether gradients are synchronised in each microbatch.

        Args:
            state (State): On BEFORE_FORWARD.
            num_samples (Callable): Counts the samples of the microbatch.
        """
        if self._step_size is not None and not self._syncs_once and isinstance(state.model, DistributedDataParallel):
            self._saw_one_sync = num_samples() < self._step_size and not state.model.require_backward_grad_sync
        self._step_size = None
