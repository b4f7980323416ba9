"""Doing a run of the gradient-error study."""

from __future__ import annotations

from typing import Any

from composer_gradmatch.studies.gradient_error.decompose import error_parts
from composer_gradmatch.studies.gradient_error.measure import gradient_error
from composer_gradmatch.studies.store import Run

__all__ = ["gradient_error_run"]


def gradient_error_run(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compares gradients with the full data's, or tells what the error against the minibatch's is made of."""
    return error_parts(run) if run.settings["against"] == "minibatch" else gradient_error(run)
