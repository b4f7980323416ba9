"""Trials as a study's runs: each is made by an engine, once, and kept in the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.studies.engines.engine import Engine
from composer_gradmatch.studies.store import Record, Run, Store
from composer_gradmatch.studies.tasks import for_workers
from composer_gradmatch.studies.verdict.trial import Outcome, Trial

__all__ = ["Stored", "making", "outcome_of"]


class Stored:
    """Takes trials from a study's folder, and makes and keeps those that are not there; a :data:`.Source`.

    What is known to be asked for next is made at the same time, where there is room.

    Args:
        store (Store): The folder.
        run_of (Callable): A trial as a run.
        make (Callable): Makes a run.
        retry_failed (bool, optional): Whether one that failed is made once more. Default: ``False``.
        at_once (int, optional): So many runs are made at a time. Default: ``1``.
    """

    def __init__(
        self,
        store: Store,
        run_of: Callable[[Trial], Run],
        make: Callable[[Run], Record],
        retry_failed: bool = False,
        at_once: int = 1,
    ) -> None:
        self._store, self._run_of, self._make, self._retry_failed = store, run_of, make, retry_failed
        self.at_once = at_once
        self._threads = ThreadPoolExecutor(at_once) if at_once > 1 else None
        self._begun: dict[Trial, Future[Record]] = {}
        self._next: list[Trial] = []

    def has(self, trial: Trial) -> bool:
        """Tells whether a trial is on record or being made, and so is paid for."""
        return trial in self._begun or self._store.record(self._run_of(trial)) is not None

    def expect(self, trials: Iterable[Trial]) -> None:
        """Tells which trials are asked for next, in the place of those that were told before."""
        self._next = list(trials)

    def __call__(self, trial: Trial) -> Outcome:
        """Gives what came of a trial."""
        if self._threads is None:
            return outcome_of(self._on_record(trial) or self._made(trial))
        self._next.insert(0, trial)
        while (record := self._ended(trial)) is None:
            begun = self._fill(self._threads)
            wait(begun, return_when=FIRST_COMPLETED)
        return outcome_of(record)

    def _ended(self, trial: Trial) -> Record | None:
        if trial not in self._begun:
            return self._on_record(trial)
        future = self._begun[trial]
        return future.result() if future.done() else None

    def _fill(self, threads: ThreadPoolExecutor) -> list[Future[Record]]:
        """Begins what is next, as far as there is room; returns what is being made."""
        running = [future for future in self._begun.values() if not future.done()]
        while self._next and len(running) < self.at_once:
            trial = self._next.pop(0)
            if trial not in self._begun and self._on_record(trial) is None:
                self._begun[trial] = threads.submit(self._made, trial)
                running.append(self._begun[trial])
        return running

    def _on_record(self, trial: Trial) -> Record | None:
        record = self._store.record(self._run_of(trial))
        return None if record is not None and self._retry_failed and record.error else record

    def _made(self, trial: Trial) -> Record:
        run = self._run_of(trial)
        record = self._make(run)
        self._store.save(run, record)
        return record

    def close(self) -> None:
        """Begins nothing more."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def outcome_of(record: Record) -> Outcome:
    """Reads a record of a training run."""
    if record.error:
        return Outcome((), (), record.seconds, record.error.splitlines()[0])
    details = record.details
    return Outcome(tuple(details["accuracies"]), tuple(details["training_seconds"]), record.seconds)


@contextmanager
def making(store: Store, engine: Engine) -> Iterator[Callable[[Run, str], Record]]:
    """Gives what makes a run by a task; nothing else may use the engine meanwhile.

    Args:
        store (Store): Its folder has the logs.
        engine (Engine): Makes as many at a time as it has slots.
    """
    logs = store.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    engine.prepare(engine.slots)

    def make(run: Run, task: str) -> Record:
        return engine.do(for_workers(task, builder_of(run.config)), run, logs)

    yield make
