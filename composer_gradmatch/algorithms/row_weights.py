"""The way of weights from the picks to the rows of each microbatch, which other algorithms may have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from composer.core import State

from composer_gradmatch.batches.nests import map_nest
from composer_gradmatch.batches.picked_rows import RowRecord
from composer_gradmatch.batches.reader import BatchReader

__all__ = ["RowWeights"]


class RowWeights:
    """Picks rows, recognises them in the batch that the Trainer splits and in microbatches, and finds their weights.

    Args:
        reader (BatchReader): Reads the batches.
        warn (Callable): Warns once a run.
        owner (str): The algorithm that it is for, for the messages.
    """

    def __init__(self, reader: BatchReader, warn: Callable[[str], None], owner: str) -> None:
        self.reader, self.warn, self.owner = reader, warn, owner
        self.reset_fit()

    def reset_fit(self) -> None:
        """Forgets what belongs to one ``fit``."""
        #: Whether weights have reached a loss.
        self.weighed = False
        self.clear()

    def clear(self) -> None:
        """Forgets a step."""
        self._weights: torch.Tensor | None = None
        self._picked: RowRecord | None = None
        self._trained: RowRecord | None = None
        #: The weights of the samples of the microbatch that is being trained on, shape (n,).
        self.of_microbatch: torch.Tensor | None = None
        #: Whether the weights are those of a rehearsal, on the whole minibatch, and reach no loss.
        self.rehearsing = False

    @property
    def has_picks(self) -> bool:
        """Whether the step's batch is one of picks."""
        return self._picked is not None

    @property
    def has_weights(self) -> bool:
        """Whether they are weighted."""
        return self._weights is not None

    def pick(self, batch: Any, indices: torch.Tensor, num_samples: int, recorded: bool = True) -> Any:
        """Takes the picks of M samples.

        Args:
            batch (Any): A batch of M samples.
            indices (torch.Tensor): The picks, shape (n,).
            num_samples (int): M.
            recorded (bool, optional): Whether to remember them as they are, so that they are known again. Default:
                ``True``.
        """
        names = self.reader.names(batch, num_samples)
        picked = self.reader.take(batch, indices, num_samples, names)
        if recorded:
            self._picked = RowRecord.of(picked, len(indices), names, original=batch, indices=indices)
        return picked

    def give(self, weights: torch.Tensor) -> None:
        """Gives the picks their weights, shape (n,), on the device of the loss."""
        self._weights = weights

    def rehearse(self, state: State, num_samples: int) -> None:
        """Lets a batch that is trained whole go the way of weighted picks, up to its losses."""
        self.rehearsing = True
        self._picked = RowRecord.of(state.batch, num_samples, self.reader.names(state.batch, num_samples))
        # Of samples that cannot be told apart, equal weights would hide it.
        self.give(state.device.tensor_to_device(torch.linspace(0.5, 1.5, num_samples)))

    def find_rows(self, batch: Any) -> None:
        """Finds which pick each row of the batch is that the Trainer will split.

        Raises:
            ValueError: If that cannot be told in the first weighted step.
        """
        assert self._weights is not None
        assert self._picked is not None
        if self._picked.is_still(batch):
            self._trained = self._picked
            return
        num_samples = self.reader.count(batch)
        try:
            if num_samples != len(self._weights):
                raise ValueError(
                    f"{self.owner} picked {len(self._weights)} weighted samples, but another algorithm then "
                    f"made them {num_samples}. List {self.owner} before that algorithm in the Trainer's "
                    "algorithms and leave out select_first: then it comes last, since Composer reverses the order."
                )
            self._weights = self._picked.weights_now(batch, self._weights)
        except ValueError as error:
            self._weigh_all_alike(error, num_samples)
        self._trained = self._picked.updated(batch)

    def _weigh_all_alike(self, error: ValueError, num_samples: int) -> None:
        """Ends the run if weights cannot reach their samples from its first step on; later, gives up this step's."""
        if not self.weighed:
            raise error
        assert self._weights is not None
        self.warn(f"the picks of some steps are trained with weights one: {error}")
        self._weights = torch.ones(num_samples, device=self._weights.device)

    def rows_of(self, microbatch: Any) -> torch.Tensor | None:
        """Tells which picks a microbatch has, if they are as they were: see :meth:`.RowRecord.rows_unchanged`."""
        return None if self._picked is None else self._picked.rows_unchanged(microbatch)

    def enter_microbatch(self, microbatch: Any) -> Any:
        """Finds the weights of a microbatch's samples.

        Args:
            microbatch (Any): As the Trainer has split it.

        Returns:
            Any: The microbatch, with those tensors whole that turned out not to be per sample.

        Raises:
            ValueError: If it cannot be told which samples it has, in the first weighted step.
        """
        record = self._trained or self._picked
        if record is not None and record.is_still(microbatch):
            self.of_microbatch = self._weights
            return microbatch
        if record is not None:
            microbatch = self._with_shared_tensors_whole(microbatch, record)
        if self._weights is None:
            return microbatch
        assert self._trained is not None
        try:
            self.of_microbatch = self._trained.weights_of(microbatch, self._weights)
        except ValueError as error:
            num_samples = self.reader.count(microbatch)
            self._weigh_all_alike(error, len(self._weights))
            self.of_microbatch = torch.ones(num_samples, device=self._weights.device)
        return microbatch

    def _with_shared_tensors_whole(self, microbatch: Any, trained: RowRecord) -> Any:
        """Gives a microbatch with those tensors whole that were picked from since their length happened to be M.

        That they are not per sample is seen by their not being split.
        """
        assert self._picked is not None
        shared = trained.names_left_whole(microbatch)
        self.reader.leave_whole(shared)
        originals = {name: self._picked.original[name] for name in shared if name in self._picked.original}
        if not originals:
            return microbatch
        return map_nest(lambda name, leaf: originals.get(name, leaf), microbatch)
