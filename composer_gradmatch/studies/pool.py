"""Runs in worker processes: one that fails, or dies, is recorded, and the others go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from composer_gradmatch.studies.provenance import provenance
from composer_gradmatch.studies.store import Record, Run

__all__ = ["run_all"]

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
    rows, details, error = [], {}, ""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            rows, details = task(run)
        except Exception as caught:  # Whatever a run fails of is its result.
            error = f"{type(caught).__name__}: {caught}"
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    seconds = time.perf_counter() - started
    return Record(run.kind, run.settings, run.config, rows, error, provenance(), seconds, details)


def _gpus() -> list[str]:
    import torch

    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


def run_all(task: Task, runs: Sequence[Run], jobs: int, logs: Path) -> Iterator[tuple[Run, Record]]:
    """Does runs in ``jobs`` processes, each with its share of the CPU cores and, in turn, one of the GPUs.

    Workers end with this process, however it ends.

    Args:
        task (Callable): Does a run; a function of a module, since it is sent to the workers.
        runs (Sequence[Run]): What to do.
        jobs (int): Processes.
        logs (Path): A folder for what the runs print, a file each.

    Yields:
        tuple[Run, Record]: As runs end. One whose process died has the error in its record.
    """
    logs.mkdir(parents=True, exist_ok=True)
    jobs = min(jobs, len(runs))
    if not jobs:
        return
    gpus = _gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // jobs)
    local = threading.local()
    started = iter(range(jobs))
    executors: list[ProcessPoolExecutor] = []

    def own_process() -> ProcessPoolExecutor:
        if getattr(local, "executor", None) is None:
            if not hasattr(local, "gpu"):
                local.gpu = gpus[next(started) % len(gpus)] if gpus else None
            local.executor = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), _start_worker, (threads, local.gpu)
            )
            executors.append(local.executor)
        return local.executor

    def do(run: Run) -> Record:
        log = logs / f"{run.key}.log"
        begun = time.perf_counter()
        try:
            return own_process().submit(_work, task, run, log).result()
        except BrokenProcessPool:
            local.executor = None
            error = f"The run's process died (out of memory, or killed). What it printed is in {log}."
            return Record(run.kind, run.settings, run.config, [], error, provenance(), time.perf_counter() - begun)

    waiting = ThreadPoolExecutor(jobs)
    try:
        futures = {waiting.submit(do, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # Stopped half-way, the runs that have not begun never will.
        waiting.shutdown(wait=False, cancel_futures=True)
        for executor in executors:
            executor.shutdown(wait=False)
