"""A run of the step-time study, by what it times."""

from __future__ import annotations

from typing import Any

from composer_gradmatch.studies.step_time.stored_timer import stored_step_time
from composer_gradmatch.studies.step_time.timer import step_time
from composer_gradmatch.studies.store import Run

__all__ = ["time_steps"]


def time_steps(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Times steps: see :func:`.step_time`, and :func:`.stored_step_time` for strategies with stored looks."""
    return stored_step_time(run) if run.options.get("stored") else step_time(run)
