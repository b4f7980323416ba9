"""Runs in worker processes: one that fails, or dies, is recorded, and the others go on."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from composer_gradmatch.studies.provenance import provenance
from composer_gradmatch.studies.store import Record, Run

__all__ = ["Here", "Worker", "run_all", "workers"]

#: Does a run: (rows, details).
Task = Callable[[Run], tuple[list[dict], dict]]


def _start_worker(threads: int, gpu: str | None) -> None:
    import composer.core  # noqa: F401  # Before the signals, for which it sets handlers.
    import torch
    from threadpoolctl import threadpool_limits

    for stop in (signal.SIGINT, signal.SIGTERM):  # The parent's to handle; its workers end with it.
        signal.signal(stop, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _work(task: Task, run: Run, log: Path) -> Record:
    """Runs in the worker, with all that is printed going to the log."""
    started = time.perf_counter()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        rows, details, error = _tried(task, run)
        sys.stdout.flush()
        sys.stderr.flush()
    seconds = time.perf_counter() - started
    return Record(run.kind, run.settings, run.config, rows, error, provenance(), seconds, details)


def _tried(task: Task, run: Run) -> tuple[list[dict], dict, str]:
    """Does a run: returns its rows and details, and what it failed of."""
    try:
        return (*task(run), "")
    except Exception as caught:  # Whatever a run fails of is its result.
        traceback.print_exc()
        return [], {}, f"{type(caught).__name__}: {caught}"


def _gpus() -> list[str]:
    import torch

    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


class Worker:
    """A process that does one run after the other: started for the first, and again after it died.

    Args:
        threads (int): CPU threads that it may use.
        gpu (str, optional): The only GPU that it sees; None to leave that as it is.
    """

    def __init__(self, threads: int, gpu: str | None) -> None:
        self._arguments = (threads, gpu)
        self._executor: ProcessPoolExecutor | None = None

    def do(self, task: Task, run: Run, logs: Path) -> Record:
        """Does a run; what it prints goes into a file of its own in a folder, which must be there."""
        log = logs / f"{run.key}.log"
        begun = time.perf_counter()
        if self._executor is None:
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(1, spawn, _start_worker, self._arguments)
        try:
            return self._executor.submit(_work, task, run, log).result()
        except BrokenProcessPool:
            self._executor = None
            error = f"The run's process died (out of memory, or killed). What it printed is in {log}."
            return Record(run.kind, run.settings, run.config, [], error, provenance(), time.perf_counter() - begun)

    def close(self) -> None:
        """Ends the process, once it has done what it is doing."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)


class Here:
    """Does runs in this process, one after the other: for what no other process can be sent."""

    def do(self, task: Task, run: Run, logs: Path) -> Record:
        """Does a run, as :meth:`Worker.do` does."""
        started = time.perf_counter()
        with (
            (logs / f"{run.key}.log").open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            warnings.catch_warnings(),
        ):
            rows, details, error = _tried(task, run)
        gc.collect()  # Of a model and its Trainer, which know each other.
        seconds = time.perf_counter() - started
        return Record(run.kind, run.settings, run.config, rows, error, provenance(), seconds, details)

    def close(self) -> None:
        """Does nothing: there is no other process."""


def workers(jobs: int) -> list[Worker]:
    """Gives so many workers, each with its share of the CPU cores and, in turn, one of the GPUs."""
    gpus = _gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [Worker(max(1, cores // jobs), gpus[job % len(gpus)] if gpus else None) for job in range(jobs)]


def run_all(task: Task, runs: Sequence[Run], jobs: int, logs: Path, here: bool = False) -> Iterator[tuple[Run, Record]]:
    """Does runs in ``jobs`` processes, each with its share of the CPU cores and, in turn, one of the GPUs.

    Workers end with this process, however it ends.

    Args:
        task (Callable): Does a run; a function of a module, since it is sent to the workers.
        runs (Sequence[Run]): What to do.
        jobs (int): Processes.
        logs (Path): A folder for what the runs print, a file each.
        here (bool, optional): Whether they are done in this process, in the place of all that. Default: ``False``.

    Yields:
        tuple[Run, Record]: As runs end. One whose process died has the error in its record.
    """
    logs.mkdir(parents=True, exist_ok=True)
    jobs = min(jobs, len(runs))
    if not jobs:
        return
    if here:
        for run in runs:
            yield run, Here().do(task, run, logs)
        return
    local = threading.local()
    idle = workers(jobs)
    started = list(idle)

    def do(run: Run) -> Record:
        if not hasattr(local, "worker"):
            local.worker = idle.pop()
        return local.worker.do(task, run, logs)

    waiting = ThreadPoolExecutor(jobs)
    try:
        futures = {waiting.submit(do, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # Stopped half-way, the runs that have not begun never will.
        waiting.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.close()
