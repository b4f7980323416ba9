"""Doing a run in a worker process, which is sent the name of what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from composer_gradmatch.studies.store import Run
from composer_gradmatch.train.register_files import load_files
from composer_gradmatch.train.trainer import expect_small_batches

__all__ = ["do_run"]


def do_run(task: str, run: Run, files: Sequence[Path] = ()) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Does a run by the task of its study: returns its rows, and what is too long for a table.

    Args:
        task (str): See :class:`.Study`.
        run (Run): What to do.
        files (Sequence[Path], optional): What ``--register`` has named. Default: ``()``.
    """
    load_files(files)
    expect_small_batches()
    return resolve_name(task)(run)
