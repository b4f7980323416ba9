"""Trials as a study's runs: each is made in a worker process, once, and kept in the folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.studies.pool import Here, workers
from composer_gradmatch.studies.store import Record, Run, Store
from composer_gradmatch.studies.tasks import for_workers
from composer_gradmatch.studies.verdict.trial import Outcome, Source, Trial

__all__ = ["make_in_worker", "outcome_of", "stored"]


def stored(
    store: Store, run_of: Callable[[Trial], Run], make: Callable[[Run], Record], retry_failed: bool = False
) -> Source:
    """Gives what takes trials from a study's folder, and makes and keeps those that are not there.

    Args:
        store (Store): The folder.
        run_of (Callable): A trial as a run.
        make (Callable): Makes a run.
        retry_failed (bool, optional): Whether one that failed is made once more. Default: ``False``.
    """

    def source(trial: Trial) -> Outcome:
        run = run_of(trial)
        record = store.record(run)
        if record is None or (retry_failed and record.error):
            record = make(run)
            store.save(run, record)
        return outcome_of(record)

    return source


def outcome_of(record: Record) -> Outcome:
    """Reads a record of a training run."""
    if record.error:
        return Outcome((), (), record.seconds, record.error.splitlines()[0])
    details = record.details
    return Outcome(tuple(details["accuracies"]), tuple(details["training_seconds"]), record.seconds)


@contextmanager
def make_in_worker(store: Store) -> Iterator[Callable[[Run, str], Record]]:
    """Gives what makes a run by a task, in one process with all cores and one GPU, so that nothing disturbs its times.

    What can be built in this process alone is made in it.

    A record's seconds are all that went by, with the start of the process, since that is what a budget is of.
    """
    logs = store.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (worker,) = workers(1)
    here = Here()

    def make(run: Run, task: str) -> Record:
        begun = time.perf_counter()
        record = (here if builder_of(run.config).here else worker).do(for_workers(task), run, logs)
        return replace(record, seconds=time.perf_counter() - begun)

    try:
        yield make
    finally:
        worker.close()
