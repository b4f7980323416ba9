"""A run on a node of Ray's: what is done in the worker process there."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ray import cloudpickle

from composer_gradmatch.registered import registered
from composer_gradmatch.studies.engines.attempt import attempt
from composer_gradmatch.studies.store import Record

__all__ = ["work"]

#: So much of what a run printed is sent, its end.
_PRINTED = 1_000_000


def work(
    begun: float, task: bytes, run: bytes, key: str, threads: int, folder: str, path: Sequence[str]
) -> tuple[Record, str]:
    """Does a run.

    Args:
        begun (float): When this was called, by ``time.perf_counter``.
        task (bytes): What does it, pickled, with what was registered in the study's process.
        run (bytes): The run, pickled.
        key (str): Its name.
        threads (int): CPU threads that it may use.
        folder (str): The study's working directory, in which files are looked up where this machine has it.
        path (Sequence[str]): Where the study's process looks up modules.

    Returns:
        tuple[Record, str]: What came of it, and what it printed.
    """
    _share_machine(threads)
    with suppress(OSError):
        os.chdir(folder)
    sys.path += [entry for entry in path if entry not in sys.path and os.path.exists(entry)]
    # Named for who looks for it where the process dies.
    descriptor, name = tempfile.mkstemp(prefix=f"{key}-", suffix=".log")
    with _printing_to(descriptor):
        own, does = cloudpickle.loads(task)
        for kind, names in own.items():
            registered(kind).update(names)
        record = attempt(does, cloudpickle.loads(run))
    log = Path(name)
    printed = log.read_bytes()[-_PRINTED:].decode(errors="replace")
    log.unlink()
    seconds = time.perf_counter() - begun
    return replace(record, seconds=seconds, provenance={**record.provenance, "node": socket.gethostname()}), printed


def _share_machine(threads: int) -> None:
    handlers = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    import composer.core  # noqa: F401  # It sets handlers, and Ray ends its workers by signals.
    import torch
    from threadpoolctl import threadpool_limits

    for stop, handler in handlers.items():
        signal.signal(stop, handler)
    torch.set_num_threads(threads)
    threadpool_limits(threads)


@contextmanager
def _printing_to(descriptor: int) -> Iterator[None]:
    """Has all that this process prints go to a file, which is closed."""
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    for stream in kept:
        os.dup2(descriptor, stream)
    os.close(descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, own in kept.items():
            os.dup2(own, stream)
            os.close(own)
