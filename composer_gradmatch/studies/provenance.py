"""Where a number comes from: machine, package versions and git revision."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from composer_gradmatch.train.register_files import loaded_files

__all__ = ["provenance"]

_PACKAGES = ("composer-gradmatch", "mosaicml", "torch", "numpy", "scikit-learn", "torchmetrics")


def provenance() -> dict[str, str]:
    """Gives the columns that say on what and with what a run was made; unknown ones are ``"unknown"``."""
    return {
        "machine": _machine(),
        "python": platform.python_version(),
        **{f"{name} version": _version(name) for name in _PACKAGES},
        "git revision": _revision(),
        **{f"registered {file.name}": f"SHA-256 {digest}" for file, digest in loaded_files().items()},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores, {_processor()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _revision() -> str:
    """Finds the revision of the repository that the command was started in; -dirty where files differ from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
