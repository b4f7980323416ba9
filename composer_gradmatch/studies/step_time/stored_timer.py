"""Steps of strategies with stored looks, which are not alike: timed over a whole period of their looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from composer.core import State
from torch.utils.data import DataLoader

from composer_gradmatch.batches.sample_numbers import without_numbers
from composer_gradmatch.studies.interleave import Variant, fit_interleaved
from composer_gradmatch.studies.step_time.timer import StepTimer, add_ratios
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import strategy_named
from composer_gradmatch.train.builders import build_loader

__all__ = ["RepeatedBatches", "stored_step_time"]


class RepeatedBatches:
    """Gives each batch of a loader several times in a row, so that each of as many variants sees each sample once.

    So a sample's look ages by an epoch in each epoch, as in a run of one variant alone.

    Args:
        loader (DataLoader): Gives batches; with a sampler that is set to epochs.
        times (int): How often each is given.
    """

    def __init__(self, loader: DataLoader, times: int) -> None:
        self.loader, self.times, self.dataset, self.batch_size = loader, times, loader.dataset, loader.batch_size
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.loader) * self.times

    def __iter__(self) -> Iterator[Any]:
        sampler: Any = self.loader.sampler
        sampler.set_epoch(self._epoch)
        self._epoch += 1
        for batch in self.loader:
            for _ in range(self.times):
                yield batch


class _StoredTimer(StepTimer):
    """Times variants of which some have a store; the others' batches have no numbers."""

    def cut(self, state: State, size: int) -> None:
        """Takes the numbers out of the batch of a variant that does not do it itself: see :class:`.Interleaved`."""
        if not strategy_named(self.current.strategy).is_stored:
            state.batch = without_numbers(state.batch)
        state.batch = state.device.batch_to_device(state.batch)


def _epochs(variants: Sequence[Variant]) -> int:
    """Gives the longest time between two looks at a sample, in epochs."""
    return max(
        int(str(strategy_named(v.strategy).arguments.get("refresh", "1ep")).removesuffix("ep")) for v in variants
    )


def stored_step_time(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Times the run's variants on each batch in turn, over the epochs from one look at a sample to the next.

    In the first epoch, which is not timed, all samples are looked at. The order of the batches, as of the variants of
    each, is random. Weights are held still.

    Args:
        run (Run): With its ``variants``, of one batch size: those with a store, and the full batch.

    Returns:
        tuple[list[dict[str, Any]], dict[str, Any]]: A row for each variant and batch, as those of :func:`.step_time`;
        ``measured`` is ``"period"``.
    """
    variants = [Variant.build(run.config, *variant) for variant in run.options["variants"]]
    size = variants[0].batch_size
    section = {**run.config["train_loader"], "drop_last": True}
    loader = build_loader(section, size, "train_loader", numbered=True)
    batches = len(loader)
    timer = _StoredTimer(variants, run.config, _epochs(variants) * batches, batches, 0, "period")
    config = {**run.config, "train_loader": section}
    fit_interleaved(config, timer, size, timer.steps, RepeatedBatches(loader, len(variants)))
    add_ratios(timer.rows)
    return timer.rows, {}
