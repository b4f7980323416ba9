"""A callback that writes who was picked: each epoch a Parquet file with a row for each sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from composer_gradmatch.algorithms.pick_counts import PickCounts
from composer_gradmatch.algorithms.run_folder import folder_in_run
from composer_gradmatch.algorithms.subset_backprop import SubsetBackprop
from composer_gradmatch.candidates.stored import StoredLooks
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks

__all__ = ["SelectionLog"]


class SelectionLog(Callback):
    """Writes ``selection_log/ep{epoch}.parquet`` after each epoch, and for one that was begun when training ends.

    It needs a selecting algorithm with ``refresh``, which knows the samples' numbers. A row has ``epoch`` (from 1, as
    in the names of checkpoints), ``sample`` (its number), ``visits`` (how often it was in a minibatch of the epoch),
    ``picked`` (how often it was trained on, with a weight other than zero), ``mean_weight`` (of those steps), and
    ``loss`` and ``gradient_norm`` (of the last layer) as the rule last saw them, in this epoch or before; null where
    they are not known. In steps that are not selected from, all samples of the minibatch count as picked, with
    weight one. Counts are of all ranks; rank 0 writes. A run resumed in mid-epoch goes on counting.

    Args:
        folder (str, optional): Where to write; ``{run_name}`` is the run's. None for ``selection_log`` in the folder of
            the run's checkpoints. Default: ``None``.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: At FIT_START, if the samples have no numbers, or there is no folder.

    Example:
        .. code-block:: python

            log = pandas.read_parquet("runs/digits-gradmatch/selection_log")  # All epochs.
            log.groupby("sample")["picked"].sum().sort_values()
    """

    def __init__(self, folder: str | None = None) -> None:
        if find_spec("pyarrow") is None:
            raise ImportError("selection_log writes Parquet by pyarrow: pip install 'composer-gradmatch[studies]'.")
        self.folder = folder
        self.counts: PickCounts | None = None
        self._restored: dict[str, Any] = {}
        self._algorithm: SubsetBackprop | None = None
        self._store: StoredLooks | None = None
        #: The picks of the last step that was seen: those that are still there after a step were not of it.
        self._last: Picks | None = None
        #: Numbers, losses and gradient norms of the step's candidates.
        self._looked: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Finds the selecting algorithm and the folder, and begins to count."""
        self._release()
        found = [each for each in state.algorithms if isinstance(each, SubsetBackprop) and each.selector.store]
        if not found:
            raise ValueError(
                "selection_log has no sample numbers to count by: they come with a store of looks. Give the selecting "
                "algorithm refresh, for instance refresh='5ep', or '1ep' for a look at each sample in each epoch; "
                "or leave selection_log out."
            )
        self._algorithm = found[0]
        self._store, self._last = self._algorithm.selector.store, self._algorithm.last_selection
        assert self._store is not None
        size = self._store.numbering.size
        assert size is not None  # Or the algorithm would have raised.
        if self._restored:
            self.counts = PickCounts.of_state(self._restored, with_epoch=dist.get_global_rank() == 0)
            self._restored = {}
        if self.counts is None or self.counts.size != size or self._store.numbering.has_changed:
            self.counts = PickCounts(size)
        folder = self._path(state)
        self._watch(self._store)
        if dist.get_global_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("ep*.parquet"):
                # Of a run in whose place this one is, or that was resumed from before that epoch.
                if (match := re.fullmatch(r"ep(\d+)\.parquet", path.name)) and int(match[1]) > state.timestamp.epoch:
                    path.unlink()

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Begins to count anew."""
        assert self.counts is not None
        self.counts.begin_epoch()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Counts the step."""
        assert self.counts is not None
        assert self._algorithm is not None
        assert self._store is not None
        numbers, picks = self._store.numbers.numpy(), self._algorithm.last_selection
        # What was picked in an earlier step stays there through those that are not selected from.
        if picks is None or picks is self._last:
            self.counts.see_step(numbers, None, None)
        else:
            matched = picks.found is None or bool(picks.found)  # If not, the weights are all one.
            weights = None if picks.weights is None or not matched else _array(picks.weights)
            self.counts.see_step(numbers, picks.indices.cpu().numpy(), weights)
        self._last = picks
        if self._looked is not None:
            self.counts.see_values(*self._looked)
            self._looked = None

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Writes the epoch's file."""
        assert self.counts is not None
        whole = self._merged()
        self._write(state, whole, int(state.timestamp.epoch))
        self.counts.known = whole.latest()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Writes the file of an epoch that was begun."""
        if int(state.timestamp.batch_in_epoch):
            self._write(state, self._merged(), int(state.timestamp.epoch) + 1)
        self._release()

    def close(self, state: State, logger: Logger) -> None:
        """Leaves the algorithm as it was, also where training has failed."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps: the counts of all ranks, since Composer saves that of rank 0."""
        return self._restored if self.counts is None else self._merged().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, once ``fit`` begins."""
        self._restored = state

    def _merged(self) -> PickCounts:
        assert self.counts is not None
        return self.counts.merged(dist.all_gather_object(self.counts.of_epoch()))

    def _watch(self, store: StoredLooks) -> None:
        """Keeps what is logged of each step's candidates, which can be asked for it before the step alone."""
        look: Callable[[State, int], Candidates] = store.look

        def noting(state: State, num_samples: int) -> Candidates:
            candidates = look(state, num_samples)
            rows = candidates.rows
            norms = _array(candidates.gram.diagonal().clamp(min=0).sqrt()) if candidates.has_gram else None
            seen = store.numbers if rows is None else store.numbers[rows]
            self._looked = seen.numpy(), _array(candidates.losses), norms
            return candidates

        vars(store)["look"] = noting

    def _release(self) -> None:
        if self._store is not None:
            vars(self._store).pop("look", None)
        self._looked = None

    def _path(self, state: State) -> Path:
        return folder_in_run(state, "selection_log", self.folder)

    def _write(self, state: State, counts: PickCounts, epoch: int) -> None:
        """Writes a file, on rank 0; one that is there already is replaced as a whole."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if dist.get_global_rank() != 0:
            return
        assert self._store is not None
        latest = counts.latest()
        store = self._store.store
        if store is not None:
            # Samples that were looked at, but kept from the rule, as suspects are.
            kept = (store.stamps >= 0).numpy() & np.isnan(latest["loss"])
            latest["loss"][kept] = _array(store.losses)[kept]
        mean_weight = np.full(counts.size, np.nan)
        np.divide(counts.weights, counts.picked, out=mean_weight, where=counts.picked > 0)
        columns = {
            "epoch": pa.array(np.full(counts.size, epoch), pa.int32()),
            "sample": pa.array(np.arange(counts.size), pa.int64()),
            "visits": pa.array(counts.visits, pa.int32()),
            "picked": pa.array(counts.picked, pa.int32()),
            "mean_weight": pa.array(mean_weight, pa.float32(), from_pandas=True),  # NaN is null.
            "loss": pa.array(latest["loss"], pa.float32(), from_pandas=True),
            "gradient_norm": pa.array(latest["gradient_norm"], pa.float32(), from_pandas=True),
        }
        path = self._path(state) / f"ep{epoch}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)


def _array(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
