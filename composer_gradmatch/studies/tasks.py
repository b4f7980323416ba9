"""Doing a run in a worker process, which is sent the name of what to do."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from composer_gradmatch.studies.store import Run
from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.register_files import load_files, loaded_files
from composer_gradmatch.train.trainer import expect_small_batches

__all__ = ["do_run", "for_workers"]


def for_workers(task: str) -> partial[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Makes of a study's task what a worker process is sent: a function of a run, which loads users' files first.

    Args:
        task (str): See :class:`.Study`.
    """
    return partial(do_run, task, files=loaded_files())


def do_run(task: str, run: Run, files: Mapping[Path, str] | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Does a run by the task of its study: returns its rows, and what is too long for a table.

    Args:
        task (str): See :class:`.Study`.
        run (Run): What to do.
        files (Mapping[Path, str], optional): What ``--register`` has named, and the SHA-256 of what these files held.
            Default: ``None``.

    Raises:
        ConfigError: If a file has changed since.
    """
    load_files(files or ())
    for file, digest in (files or {}).items():
        if loaded_files()[file] != digest:
            raise ConfigError(f"--register: {file} has changed since the study was started. Start it again.")
    expect_small_batches()
    return resolve_name(task)(run)
