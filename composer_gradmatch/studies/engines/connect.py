"""Connecting to Ray: what cannot work is told in a line, and soon."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from types import ModuleType
from urllib.parse import urlsplit

from composer_gradmatch.train.config import ConfigError, one_line

__all__ = ["connect", "import_ray"]

#: How long a connection, and Ray's own greeting, may take.
_KNOCK_SECONDS, _GREETING_SECONDS = 5, 60
_GREET = r"""
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except Exception as error:
    sys.exit("\n" + " ".join(str(error).split()))
"""


def import_ray() -> ModuleType:
    """Imports Ray.

    Raises:
        ConfigError: If it is not installed.
    """
    # Where it starts a cluster of its own, it would tell its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What it would say of CPU runs: from its next version on it does what is wanted here.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--engine ray: {error}. It needs: pip install 'composer-gradmatch[cluster]'") from error
    return ray


def connect(ray: ModuleType, address: str | None) -> bool:
    """Connects this process with a cluster, unless it is: returns whether it was not.

    Args:
        ray (ModuleType): Ray.
        address (str, optional): ``host:port``; None for what Ray finds: ``RAY_ADDRESS``, a cluster that this machine is
            a node of, or else one that is started, of this machine alone.

    Raises:
        ConfigError: If Ray does not listen there, or is of another version.
    """
    if ray.is_initialized():
        held = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", held):
            raise ConfigError(f"--address {address}: this process is connected with Ray at {held} already.")
        return False
    asked = address or os.environ.get("RAY_ADDRESS")
    if asked and asked not in ("auto", "local"):  # By these, Ray looks on this machine alone.
        _knock(asked)
        _greet(asked)
    # It takes SIGTERM for itself, which is to end the study as it does without Ray.
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except Exception as error:
        raise ConfigError(f"--engine ray: {one_line(error)}") from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    return True


def _knock(address: str) -> None:
    """Raises if nobody listens at an address. Ray itself would try for minutes, and then end the process."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: a study is no client of Ray's. Start it on a node of the cluster, with the address "
            "that ray start --head said."
        )
    if host is None or port is None:
        raise ConfigError(f"--address {address}: expected HOST:PORT, where Ray listens, such as 10.0.0.1:6379.")
    try:
        socket.create_connection((host, port), timeout=_KNOCK_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"--address {address}: nobody listens there ({error}). Give the address that ray start --head said; on a "
            "node of the cluster it can be left out."
        ) from error


def _greet(address: str) -> None:
    """Raises if what listens is not Ray, or Ray of another version; in a process of its own, which can be ended."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _GREET, address], capture_output=True, text=True, timeout=_GREETING_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"--address {address}: what listens there has not answered as Ray does for {_GREETING_SECONDS} s. Give the "
            "address that ray start --head said."
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["Ray has failed"]
        raise ConfigError(f"--address {address}: {said[-1]}")
