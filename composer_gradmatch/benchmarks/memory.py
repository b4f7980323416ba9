"""Peak memory of the selection pass and of the training step on its picks, over M at a fixed m."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer import Callback, DataSpec, Trainer
from composer.core import State
from composer.loggers import Logger

from composer_gradmatch import GradMatch, select_first
from composer_gradmatch.benchmarks.models import MODELS
from composer_gradmatch.benchmarks.peak import PeakMemory

__all__ = ["measure_memory"]


class _MeasuredGradMatch(GradMatch):
    """Takes the peak of each selection, from the forward pass to the weights."""

    peak = 0

    def _select(self, state: State, num_samples: int, num_picks: int) -> Any:
        with PeakMemory() as memory:
            selection = super()._select(state, num_samples, num_picks)
        self.peak = memory.bytes
        return selection


class _StepPeak(Callback):
    """Takes the peak of a training step: forward, loss, backward, optimizer."""

    peak = 0

    def batch_start(self, state: State, logger: Logger) -> None:
        self._memory = PeakMemory().__enter__()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._memory.__exit__(None, None, None)
        self.peak = self._memory.bytes


def measure_memory(names: Sequence[str], samples: Sequence[int] = (), picks: int | None = None) -> list[dict[str, Any]]:
    """One step of GradMatch a row: the peaks of its selection and of the training step on its picks.

    The selection pass runs once over all of M and once in microbatches of m samples, the size of the training
    step's own.

    Args:
        names (Sequence[str]): Keys of :data:`.MODELS`.
        samples (Sequence[int], optional): Sizes M; each model's own if empty. Default: ``()``.
        picks (int, optional): m; each model's own if None. Default: ``None``.

    Returns:
        list[dict[str, Any]]: Columns model, M, m and peaks in MiB.
    """
    rows = []
    for name in names:
        model = MODELS[name]
        m = model.picks if picks is None else picks
        for size in samples or model.samples:
            step_peak, (whole, _) = _StepPeak(), _step(name, size, m, size, Callback())
            parts, _ = _step(name, size, m, m, step_peak)
            rows.append(
                {
                    "model": name,
                    "M": size,
                    "m": m,
                    "selection, one pass (MiB)": whole / 2**20,
                    "selection, microbatches (MiB)": parts / 2**20,
                    "training step (MiB)": step_peak.peak / 2**20,
                }
            )
    return rows


def _step(name: str, size: int, picks: int, selection_size: int, callback: Callback) -> tuple[int, Trainer]:
    torch.manual_seed(0)
    batch, model = MODELS[name].batch(size), MODELS[name].build()
    algorithm = _MeasuredGradMatch(
        start=0.0, end=1.0, keep=picks / size, interrupt=0, selection_microbatch_size=selection_size
    )
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec([batch], get_num_samples_in_batch=lambda batch: len(batch[0])),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration="1ba",
        device_train_microbatch_size=picks,
        algorithms=[algorithm],
        algorithm_passes=[select_first],
        callbacks=[callback],
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return algorithm.peak, trainer
