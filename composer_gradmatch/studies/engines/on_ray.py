"""Runs on a Ray cluster: a task each, with a GPU or cores; one whose worker or node dies is made once more."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from concurrent import futures
from importlib.metadata import version
from pathlib import Path
from typing import Any

from composer_gradmatch.registered import KINDS, registered
from composer_gradmatch.studies.engines.attempt import died
from composer_gradmatch.studies.engines.cluster import Cluster, Share
from composer_gradmatch.studies.engines.connect import connect, import_ray
from composer_gradmatch.studies.engines.engine import Task
from composer_gradmatch.studies.store import Record, Run
from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.register_files import loaded_files

__all__ = ["OnRay"]

_ATTEMPTS = 2
#: How long a node may take to start a process and say what is installed.
_ANSWER_SECONDS = 120
_ALIKE = ("composer-gradmatch", "mosaicml", "torch")


class OnRay:
    """Makes runs as tasks of Ray's, on any of the cluster's nodes.

    Args:
        address (str, optional): See :func:`.connect`.
        jobs (int, optional): Runs at a time; None for as many as the cluster has GPUs, or nodes without any.

    Raises:
        ConfigError: If Ray is not installed, not there, or its nodes cannot make runs.
    """

    def __init__(self, address: str | None, jobs: int | None) -> None:
        self._ray = import_ray()
        self._connected = connect(self._ray, address)
        self._begun: set[Any] = set()
        self._sent: dict[bytes, Any] = {}
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._cluster = Cluster.of(self._ray.nodes())
            self._share = self._cluster.share(jobs or self._cluster.slots)
            self._check_nodes()
        except BaseException:
            self.close()
            raise
        self.slots = jobs or self._cluster.slots
        at = self._ray.get_runtime_context().gcs_address
        runs = "1 run at a time" if self.slots == 1 else f"{self.slots} runs at a time, each"
        print(f"Ray at {at}: {runs} with {self._share}.", file=sys.stderr, flush=True)
        if len(self._cluster.kinds) > 1:
            kinds = ", ".join(sorted(self._cluster.kinds))
            print(f"Its GPUs are of several kinds ({kinds}): measured costs tell these apart, too.", file=sys.stderr)

        # By value, so that the clock runs before a fresh process imports torch and Composer.
        def work(*arguments: Any) -> Any:
            import time

            begun = time.perf_counter()
            from composer_gradmatch.studies.engines.ray_worker import work

            return work(begun, *arguments)

        self._work = self._ray.remote(work)

    def _check_nodes(self) -> None:
        """Raises where a node has not the packages that this process has."""

        def versions(names: tuple[str, ...]) -> dict[str, str]:
            from importlib.metadata import PackageNotFoundError, version

            found = {}
            for name in names:
                try:
                    found[name] = version(name)
                except PackageNotFoundError:
                    found[name] = "none"
            return found

        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = self._ray.remote(num_cpus=0, max_retries=1)(versions)
        answers = {
            node: asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(_ALIKE)
            for node in self._cluster.nodes
        }
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
        for node, answer in answers.items():
            try:
                found = answer.future().result(_ANSWER_SECONDS)
            except futures.TimeoutError:
                raise ConfigError(
                    f"--engine ray: node {addresses[node]} has started no process for {_ANSWER_SECONDS} s. See what "
                    "ray status says, and that its ports are open to this machine."
                ) from None
            except self._ray.exceptions.RayError as error:
                raise ConfigError(f"--engine ray: node {addresses[node]}: {_lines(error)[0]}") from error
            for name, there in found.items():
                if there != version(name):
                    raise ConfigError(
                        f"--engine ray: {name} is {version(name)} here and {there} on node {addresses[node]}. Install "
                        "the same on all nodes, so that runs can be compared."
                    )

    def prepare(self, at_once: int) -> None:
        """Settles what each run is given."""
        self._share = self._cluster.share(at_once)

    def do(self, task: Task, run: Run, logs: Path) -> Record:
        """Does a run on a node that has room for it, and once more if the node, or the process there, dies."""
        exceptions = self._ray.exceptions
        # Not by max_retries: Ray would start a process that takes too much memory again and again.
        gone = (
            exceptions.WorkerCrashedError,
            exceptions.OutOfMemoryError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
        )
        log, errors = logs / f"{run.key}.log", []
        begun = time.perf_counter()
        for _ in range(_ATTEMPTS):
            try:
                record, printed = self._result(task, run, self._share)
            except gone as error:
                errors.append(_lines(error)[0])
                _append(log, f"The run's worker died: {errors[-1]}\n")
                continue
            except exceptions.TaskCancelledError:
                raise
            except exceptions.RayError as error:  # It did not come as far as the run.
                _append(log, str(error))
                return died(run, _lines(error)[-1], time.perf_counter() - begun)
            _append(log, printed)
            return record
        error = (
            f"The run's worker died (out of memory, killed, or its node is gone), and so did the next one's: "
            f"{errors[-1]} What it printed may be in its node's temporary folder, in {run.key}-*.log."
        )
        return died(run, error, time.perf_counter() - begun)

    def _result(self, task: Task, run: Run, share: Share) -> tuple[Record, str]:
        pickle = self._ray.cloudpickle.dumps
        remote = self._work.options(
            num_cpus=share.cores, num_gpus=share.gpus, max_retries=0, scheduling_strategy="SPREAD", name=run.key
        )
        sent = self._send(task)
        with self._lock:
            if self._closed:
                raise self._ray.exceptions.TaskCancelledError
            result = remote.remote(sent, pickle(run), run.key, max(1, share.cores), os.getcwd(), sys.path)
            self._begun.add(result)
        # Not by Ray's own get, which turns a signal's exit code into another, and may wait on once all is closed.
        future = result.future()
        try:
            while not future.done():
                futures.wait([future], timeout=1)
                if self._closed:
                    raise self._ray.exceptions.TaskCancelledError
            return future.result()
        finally:
            self._begun.discard(result)

    def _send(self, task: Task) -> Any:
        """Puts a task, and what was registered in this process, where workers find it: once, as it may be large."""
        files = {file.stem for file in loaded_files()}  # Which are sent as they are.
        own = {
            kind: {name: each for name, each in registered(kind).items() if each.function.__module__ not in files}
            for kind in KINDS
        }
        try:
            text = self._ray.cloudpickle.dumps((own, task))
        except Exception as error:  # Whatever the objects in it raise.
            raise ConfigError(
                f"--engine ray: what makes the runs cannot be sent to other machines: {error}. Have the function open "
                "files and connections itself."
            ) from error
        with self._lock:
            digest = hashlib.sha256(text).digest()
            if digest not in self._sent:
                self._sent[digest] = self._ray.put(text)
            return self._sent[digest]

    def close(self) -> None:
        """Ends the runs that are being made, and the connection if it was made here."""
        with self._lock:
            self._closed = True
            begun = list(self._begun)
        for result in begun:
            self._ray.cancel(result, force=True)
        if self._connected:
            self._ray.shutdown()


def _append(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def _lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]
