"""Doing a run in a worker process, which is sent the name of what to do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from composer_gradmatch.studies.building import Builder, built_by
from composer_gradmatch.studies.store import Run
from composer_gradmatch.train.register_files import file_contents, load_contents
from composer_gradmatch.train.trainer import expect_small_batches

__all__ = ["do_run", "for_workers"]


def for_workers(task: str, builder: Builder) -> partial[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Makes of a study's task what a worker process is sent: a function of a run, which loads users' files first.

    Args:
        task (str): See :class:`.Study`.
        builder (Builder): Of the runs; sent, too, where a process does not come to it by names.
    """
    return partial(do_run, task, files=file_contents(), builder=builder if builder.here else None)


def do_run(
    task: str, run: Run, files: Mapping[Path, bytes] | None = None, builder: Builder | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Does a run by the task of its study: returns its rows, and what is too long for a table.

    Args:
        task (str): See :class:`.Study`.
        run (Run): What to do.
        files (Mapping[Path, bytes], optional): What ``--register`` has named, and what these files held.
            Default: ``None``.
        builder (Builder, optional): Builds the run, if not the names in its config do. Default: ``None``.

    Raises:
        ConfigError: If a file has changed since.
    """
    load_contents(files or {})
    expect_small_batches()
    with nullcontext() if builder is None else built_by(builder, run.config):
        return resolve_name(task)(run)
