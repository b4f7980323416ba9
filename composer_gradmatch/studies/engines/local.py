"""Runs on this machine: in worker processes, where one that fails, or dies, leaves the others alone; or in this one."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from queue import LifoQueue

from composer_gradmatch.studies.engines.attempt import attempt, died
from composer_gradmatch.studies.engines.engine import Task
from composer_gradmatch.studies.store import Record, Run

__all__ = ["Here", "Local"]


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
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        return attempt(task, run)


def _gpus() -> list[str]:
    import torch

    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


class _Worker:
    """A process that does one run after the other: started for the first, and again after it died.

    Args:
        threads (int): CPU threads that it may use.
        gpu (str, optional): The only GPU that it sees; None to leave that as it is.
    """

    def __init__(self, threads: int, gpu: str | None) -> None:
        self._arguments = (threads, gpu)
        self._executor: ProcessPoolExecutor | None = None

    def do(self, task: Task, run: Run, logs: Path) -> Record:
        log = logs / f"{run.key}.log"
        begun = time.perf_counter()
        if self._executor is None:
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(1, spawn, _start_worker, self._arguments)
        try:
            record = self._executor.submit(_work, task, run, log).result()
            return replace(record, seconds=time.perf_counter() - begun)
        except BrokenProcessPool:
            self._executor = None
            error = f"The run's process died (out of memory, or killed). What it printed is in {log}."
            return died(run, error, time.perf_counter() - begun)

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False)


class Local:
    """Does runs in processes, each with its share of the CPU cores and, in turn, one of the GPUs.

    They end with this process, however it ends.

    Args:
        jobs (int): Processes.
    """

    def __init__(self, jobs: int) -> None:
        self.slots = jobs
        self._workers: list[_Worker] = []
        self._idle: LifoQueue[_Worker] = LifoQueue()

    def prepare(self, at_once: int) -> None:
        """Gives each of so many processes its share; those that have it go on."""
        if len(self._workers) == at_once:
            return
        self.close()
        gpus = _gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // at_once)
        self._workers = [_Worker(threads, gpus[job % len(gpus)] if gpus else None) for job in range(at_once)]
        self._idle = LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def do(self, task: Task, run: Run, logs: Path) -> Record:
        """Does a run in a process that is idle."""
        worker = self._idle.get()
        try:
            return worker.do(task, run, logs)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the processes, once they have done what they are doing."""
        for worker in self._workers:
            worker.close()


class Here:
    """Does runs in this process, one after the other: for what no other process can be sent."""

    slots = 1

    def prepare(self, at_once: int) -> None:
        """Does nothing: there is nothing to share."""

    def do(self, task: Task, run: Run, logs: Path) -> Record:
        """Does a run."""
        begun = time.perf_counter()
        with (
            (logs / f"{run.key}.log").open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            warnings.catch_warnings(),
        ):
            record = attempt(task, run)
        gc.collect()  # Of a model and its Trainer, which know each other.
        return replace(record, seconds=time.perf_counter() - begun)

    def close(self) -> None:
        """Does nothing: there is no other process."""
