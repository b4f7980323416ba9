"""A study's results as files: the table, the summary and the figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from composer_gradmatch.studies.report_accuracy import report_accuracy
from composer_gradmatch.studies.report_gradient_error import report_gradient_error
from composer_gradmatch.studies.report_learning_rate import report_learning_rate
from composer_gradmatch.studies.report_step_time import report_step_time
from composer_gradmatch.studies.store import Store, write_atomically

__all__ = ["write_report"]

_REPORTS: dict[str, Callable[[Store, str], list[str]]] = {
    "accuracy": report_accuracy,
    "gradient-error": report_gradient_error,
    "learning-rate": report_learning_rate,
    "step-time": report_step_time,
}


def write_report(store: Store, study: str, name: str) -> Path:
    """Writes ``results.csv``, ``summary.md`` and the figures from all records in the folder.

    Args:
        store (Store): The study's folder.
        study (str): The study's name.
        name (str): What the report calls the config.

    Returns:
        Path: The summary's file.
    """
    store.write_table(study, "results.csv")
    if study == "accuracy":
        store.write_table("step-time", "costs.csv")
    path = store.folder / "summary.md"
    write_atomically(path, "\n".join(_REPORTS[study](store, name)) + "\n")
    return path
