"""What makes runs, wherever it does: one run at a call, and as many calls at a time as it has slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from composer_gradmatch.studies.engines import ENGINES
from composer_gradmatch.studies.store import Record, Run
from composer_gradmatch.train.config import ConfigError, nearest

__all__ = ["Engine", "Task", "open_engine", "run_all"]

#: Does a run: (rows, details).
Task = Callable[[Run], tuple[list[dict], dict]]


class Engine(Protocol):
    """Makes runs. Nothing but the records that it returns comes of them, and nothing is written but logs."""

    #: Runs at a time.
    slots: int

    def prepare(self, at_once: int) -> None:
        """Prepares for so many runs at a time, which share what there is; nothing may be running."""
        ...

    def do(self, task: Task, run: Run, logs: Path) -> Record:
        """Does a run, and returns when it is done; called in as many threads as was prepared for.

        A run that fails, or whose process dies, has the error in its record. A record's seconds begin with the start of
        the process, where one was started for it.

        Args:
            task (Callable): Does the run, where it is made.
            run (Run): What to do.
            logs (Path): A folder, which is there, for what the run prints: a file of its own.
        """
        ...

    def close(self) -> None:
        """Lets go of the processes. Runs that have not ended come to nothing."""
        ...


@contextmanager
def open_engine(name: str, address: str | None, jobs: int | None, here: bool) -> Iterator[Engine]:
    """Opens an engine by its name, and closes it however it is left.

    Args:
        name (str): One of :data:`ENGINES`.
        address (str, optional): Where Ray listens; None to use the cluster that this machine is of, or to start one.
        jobs (int, optional): Runs at a time; None for one, or what the cluster has room for.
        here (bool): Whether runs cannot be sent to other processes of this machine.

    Raises:
        ConfigError: If there is no such engine, or it cannot be reached.
    """
    if name not in ENGINES:
        raise ConfigError(f"--engine: unknown engine {name!r}; {nearest(name, ENGINES)}")
    if address is not None and name != "ray":
        raise ConfigError(f"--address {address}: runs are made on this machine. Add --engine ray to make them there.")
    # One is imported only where it is asked for.
    if name == "ray":
        from composer_gradmatch.studies.engines.on_ray import OnRay

        engine: Engine = OnRay(address, jobs)
    else:
        from composer_gradmatch.studies.engines.local import Here, Local

        engine = Here() if here else Local(jobs or 1)
    try:
        yield engine
    finally:
        engine.close()


def run_all(engine: Engine, task: Task, runs: Sequence[Run], logs: Path) -> Iterator[tuple[Run, Record]]:
    """Does runs, as many at a time as the engine has slots.

    Args:
        engine (Engine): Makes them.
        task (Callable): Does a run; a function of a module, since it is sent to other processes.
        runs (Sequence[Run]): What to do.
        logs (Path): A folder for what the runs print, a file each.

    Yields:
        tuple[Run, Record]: As runs end. One whose process died has the error in its record.
    """
    logs.mkdir(parents=True, exist_ok=True)
    at_once = min(engine.slots, len(runs))
    if not at_once:
        return
    engine.prepare(at_once)
    if at_once == 1:  # In this thread, which alone may change how signals are handled.
        for run in runs:
            yield run, engine.do(task, run, logs)
        return
    waiting = ThreadPoolExecutor(at_once)
    try:
        futures = {waiting.submit(engine.do, task, run, logs): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # Stopped half-way, the runs that have not begun never will.
        waiting.shutdown(wait=False, cancel_futures=True)
