"""How often each sample of a data set was picked in an epoch, with which weights, and what was last seen of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["PickCounts"]

#: What is counted in an epoch on each rank, and added up over ranks.
_SUMS = ("visits", "picked", "weights")
#: What is known of a sample, the latest value of all ranks.
_VALUES = ("loss", "gradient_norm")


class PickCounts:
    """Counts by sample number.

    Args:
        size (int): N, the number of samples.

    Attributes:
        visits (np.ndarray): How often each sample was in a minibatch of the epoch, int64, shape (N,).
        picked (np.ndarray): How often it was trained on, int64, shape (N,).
        weights (np.ndarray): The sum of its weights in those steps, float64, shape (N,).
        loss (np.ndarray): Its loss when it was last seen on this rank in the epoch, float64, shape (N,); NaN if never.
        gradient_norm (np.ndarray): The norm of its last-layer gradient then, likewise.
        known (dict[str, np.ndarray]): The last loss and norm of earlier epochs, on any rank.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.known = {name: np.full(size, np.nan) for name in _VALUES}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forgets the counts of another epoch, and keeps what is known of the samples."""
        self.visits, self.picked = (np.zeros(self.size, dtype=np.int64) for _ in range(2))
        self.weights = np.zeros(self.size)
        self.loss, self.gradient_norm = (np.full(self.size, np.nan) for _ in range(2))

    def see_step(self, numbers: np.ndarray, indices: np.ndarray | None, weights: np.ndarray | None) -> None:
        """Counts a step.

        Args:
            numbers (np.ndarray): Of the minibatch's samples, shape (M,).
            indices (np.ndarray, optional): Which of them were trained on, shape (n,); None for all.
            weights (np.ndarray, optional): Their weights, shape (n,); None for ones. A sample of weight zero, which
                only fills a step up, was not picked.
        """
        np.add.at(self.visits, numbers, 1)
        trained = numbers if indices is None else numbers[indices]
        weights = np.ones(len(trained)) if weights is None else weights
        np.add.at(self.picked, trained[weights != 0], 1)
        np.add.at(self.weights, trained, weights)

    def see_values(self, numbers: np.ndarray, losses: np.ndarray, norms: np.ndarray | None) -> None:
        """Takes note of what a rule saw of samples; what is not finite is left out.

        Args:
            numbers (np.ndarray): Shape (n,).
            losses (np.ndarray): Shape (n,).
            norms (np.ndarray, optional): Of their last-layer gradients, shape (n,).
        """
        for into, values in ((self.loss, losses), (self.gradient_norm, norms)):
            if values is not None:
                usable = np.isfinite(values)
                into[numbers[usable]] = values[usable]

    def of_epoch(self) -> dict[str, np.ndarray]:
        """Gives what the epoch has shown on this rank, of the samples that it was shown."""
        rows = np.flatnonzero(self.visits)
        return {"rows": rows, **{name: getattr(self, name)[rows] for name in (*_SUMS, *_VALUES)}}

    def merged(self, of_ranks: Sequence[Mapping[str, np.ndarray]]) -> PickCounts:
        """Gives the counts of all ranks together.

        Args:
            of_ranks (Sequence[Mapping[str, np.ndarray]]): :meth:`of_epoch` of each.
        """
        whole = PickCounts(self.size)
        whole.known = {name: values.copy() for name, values in self.known.items()}
        for part in of_ranks:
            rows = part["rows"]
            for name in _SUMS:
                getattr(whole, name)[rows] += part[name]
            for name in _VALUES:
                there = np.isfinite(part[name])
                getattr(whole, name)[rows[there]] = part[name][there]
        return whole

    def latest(self) -> dict[str, np.ndarray]:
        """Gives the last loss and norm of each sample: the epoch's, else those known before; NaN if there is none."""
        of_epoch = {name: getattr(self, name) for name in _VALUES}
        return {name: np.where(np.isnan(values), self.known[name], values) for name, values in of_epoch.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps."""
        return {"size": self.size, "known": self.known, "epoch": self.of_epoch()}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], with_epoch: bool) -> PickCounts:
        """Makes counts of what :meth:`state_dict` returned.

        Args:
            state (Mapping[str, Any]): It.
            with_epoch (bool): Whether the epoch's counts are taken, which one rank must do.
        """
        counts = cls(state["size"])
        counts.known = {name: values.copy() for name, values in state["known"].items()}
        return counts.merged([state["epoch"]]) if with_epoch else counts
