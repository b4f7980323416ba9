"""Whether numbers that batches have of their own are each sample's own, told by how often they come in an epoch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler

__all__ = ["RepeatedNumbers"]

#: From how many samples on an epoch is judged.
_ENOUGH = 16


class RepeatedNumbers:
    """Counts the different numbers of an epoch.

    Where the loader's sampler gives each sample once, a number that comes again is of two samples (but for a few that
    fill ranks up). Of other samplers, which may give a sample several times, there should be half as many different
    numbers, at least, as of draws with replacement: N(1 − exp(−S/N)) of S samples.

    Args:
        size (int): N.
        dataloader (Any): The run's.
    """

    def __init__(self, size: int, dataloader: Any) -> None:
        self.size = size
        self._once = _gives_each_once(dataloader, size)
        self._may_fill_up = getattr(getattr(dataloader, "sampler", None), "num_replicas", 1)
        self._epoch: int | None = None
        self._told = False

    def see(self, numbers: torch.Tensor, epoch: int, key: Any) -> str | None:
        """Counts a batch's numbers.

        Args:
            numbers (torch.Tensor): In [0, N), shape (M,).
            epoch (int): Which epoch it is.
            key (Any): Where they come from, for the message.

        Returns:
            str | None: What to warn of, once.
        """
        if self._told:
            return None
        if epoch != self._epoch:
            self._epoch, self._samples, self._different = epoch, 0, 0
            self._seen = torch.zeros(self.size, dtype=torch.bool)
        own = numbers.unique()
        self._samples += len(numbers)
        self._different += int((~self._seen[own]).sum())
        self._seen[own] = True
        different = self._different
        if self._once:
            too_few = self._samples - different >= self._may_fill_up
        else:
            too_few = different < self.size * (1 - math.exp(-self._samples / self.size)) / 2
        if not too_few or self._samples < min(_ENOUGH, self.size):
            return None
        self._told = True
        return (
            f"{self._samples:,} samples of an epoch have {different:,} different numbers at sample_id_key={key!r}: "
            "what is stored of one sample is taken for that of others. Name numbers from 0 to N − 1 that are each "
            "sample's own, or leave sample_id_key out and wrap the data set by number_samples."
        )


def _gives_each_once(dataloader: Any, size: int) -> bool:
    if type(getattr(dataloader, "batch_sampler", None)) is not BatchSampler:
        return False
    sampler: Any = dataloader.sampler
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples <= size
    return type(sampler) in (SequentialSampler, DistributedSampler, SubsetRandomSampler)
