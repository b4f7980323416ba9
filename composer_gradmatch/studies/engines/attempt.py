"""One attempt at a run, in whatever process it is made: what came of it, or what it failed of."""

from __future__ import annotations

import sys
import time
import traceback

from composer_gradmatch.studies.engines.engine import Task
from composer_gradmatch.studies.provenance import provenance
from composer_gradmatch.studies.store import Record, Run

__all__ = ["attempt", "died"]


def attempt(task: Task, run: Run) -> Record:
    """Does a run, and records it."""
    begun = time.perf_counter()
    rows, details, error = [], {}, ""
    try:
        rows, details = task(run)
    except Exception as caught:  # Whatever a run fails of is its result.
        traceback.print_exc()
        error = f"{type(caught).__name__}: {caught}"
    sys.stdout.flush()
    sys.stderr.flush()
    seconds = time.perf_counter() - begun
    return Record(run.kind, run.settings, run.config, rows, error, provenance(), seconds, details)


def died(run: Run, error: str, seconds: float) -> Record:
    """Records a run of whose process nothing came."""
    return Record(run.kind, run.settings, run.config, [], error, provenance(), seconds)
