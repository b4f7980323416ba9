"""Peak memory of the selection pass and of the training step on its picks, beside the full batch's step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer import Callback, DataSpec, Trainer
from composer.core import Event, State
from composer.loggers import Logger

from composer_gradmatch import GradMatch, Picks, WholeBatch, select_first
from composer_gradmatch.benchmarks.models import MODELS
from composer_gradmatch.benchmarks.peak import PeakMemory
from composer_gradmatch.candidates.one_pass import OnePass

__all__ = ["measure_memory"]


class _MeasuredGradMatch(GradMatch):
    """Takes the peak of each selection, from the forward pass to the weights."""

    peak = 0

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        select = self.selector.select

        def measured(state: State, num_samples: int, num_picks: int) -> Picks | WholeBatch:
            with PeakMemory() as memory:
                picks = select(state, num_samples, num_picks)
            self.peak = memory.bytes
            return picks

        vars(self.selector).update(select=measured)


class _OnePassGradMatch(GradMatch):
    """Opens the measurement of each step before its selection; :class:`_OnePassPeak` closes it."""

    def __init__(self, keep: float) -> None:
        super().__init__(start=0.0, end=1.0, keep=keep, interrupt=0, reuse_activations=True)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.AFTER_DATALOADER:
            state.model.zero_grad()  # Or what the step before left would count as held before.
            self.memory = PeakMemory().__enter__()
        super().apply(event, state, logger)


class _OnePassPeak(Callback):
    """Takes the peak of the last step of one forward pass, from the selection to the end of the step."""

    peak = 0.0

    def __init__(self, algorithm: _OnePassGradMatch) -> None:
        self.algorithm = algorithm

    def batch_end(self, state: State, logger: Logger) -> None:
        self.algorithm.memory.__exit__(None, None, None)
        # Where the activations cannot be reused, there is no such step.
        source = self.algorithm.selector.source
        given_up = isinstance(source, OnePass) and source.given_up
        self.peak = float("nan") if given_up else self.algorithm.memory.bytes


class _StepPeak(Callback):
    """Takes the peak of a training step: forward, loss, backward, optimizer."""

    peak = 0

    def batch_start(self, state: State, logger: Logger) -> None:
        state.model.zero_grad()  # Or what the step before left would count as held before.
        self._memory = PeakMemory().__enter__()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._memory.__exit__(None, None, None)
        self.peak = self._memory.bytes


def measure_memory(
    names: Sequence[str], samples: Sequence[int] = (), picks: int | None = None, keeps: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """Measures one step of GradMatch a row: the peaks of its selection and of the training step on its picks.

    The selection pass runs once over all of M and once in microbatches of m samples, the size of the training
    step's own. With two passes, the peak of the whole step is the larger of selection's and the training step's.
    The next column is of a whole step with ``reuse_activations``: NaN where the model does not allow it. The last is
    of a step on all M samples, in one microbatch and without any algorithm.

    Args:
        names (Sequence[str]): Keys of :data:`.MODELS`.
        samples (Sequence[int], optional): Sizes M; each model's own if empty. Default: ``()``.
        picks (int, optional): m; each model's own if None. Not used with ``keeps``. Default: ``None``.
        keeps (Sequence[float], optional): Fractions, each for a row of m = max(1, int(keep·M)). Default: ``()``.

    Returns:
        list[dict[str, Any]]: Columns model, M, keep, m and peaks in MiB.
    """
    rows = []
    for name in names:
        model = MODELS[name]
        for size in samples or model.samples:
            full, fixed = _full_batch_peak(name, size), picks or model.picks
            for keep, m in [(keep, max(1, int(keep * size))) for keep in keeps] or [(fixed / size, fixed)]:
                rows.append({"model": name, "M": size, "keep": keep, "m": m, **_peaks(name, size, m), **full})
    return rows


def _peaks(name: str, size: int, picks: int) -> dict[str, float]:
    step_peak, whole = _StepPeak(), _selection_peak(name, size, picks, size, Callback())
    parts = _selection_peak(name, size, picks, picks, step_peak)
    algorithm = _OnePassGradMatch(_keep(picks, size))
    one_pass = _OnePassPeak(algorithm)
    _run(name, size, picks, algorithm, one_pass, steps=12)  # In the first ten the pass is checked, which takes more.
    return {
        "selection, one pass (MiB)": whole / 2**20,
        "selection, microbatches (MiB)": parts / 2**20,
        "training step (MiB)": step_peak.peak / 2**20,
        "step of one pass (MiB)": one_pass.peak / 2**20,
    }


def _full_batch_peak(name: str, size: int) -> dict[str, float]:
    peak = _StepPeak()
    _run(name, size, size, None, peak, steps=2)  # The first warms up.
    return {"full batch's step (MiB)": peak.peak / 2**20}


def _keep(picks: int, size: int) -> float:
    """Finds a keep at which m of M samples are picked: m/M itself may round to one fewer."""
    return (picks + 0.5) / size


def _selection_peak(name: str, size: int, picks: int, selection_size: int, callback: Callback) -> int:
    algorithm = _MeasuredGradMatch(
        start=0.0, end=1.0, keep=_keep(picks, size), interrupt=0, selection_microbatch_size=selection_size
    )
    _run(name, size, picks, algorithm, callback)
    return algorithm.peak


def _run(
    name: str, size: int, microbatch_size: int, algorithm: GradMatch | None, callback: Callback, steps: int = 1
) -> None:
    torch.manual_seed(0)
    batch, model = MODELS[name].batch(size), MODELS[name].build()
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec([batch] * steps),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=f"{steps}ba",
        device_train_microbatch_size=microbatch_size,
        algorithms=None if algorithm is None else [algorithm],
        algorithm_passes=[select_first],
        callbacks=[callback],
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
