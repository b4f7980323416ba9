"""A study's results as files: the table, the summary and the figures."""

from __future__ import annotations

from pathlib import Path

from composer_gradmatch.studies.html import as_html
from composer_gradmatch.studies.registry import STUDIES
from composer_gradmatch.studies.store import Store, write_atomically

__all__ = ["write_report"]


def write_report(store: Store, study: str, name: str, command: str = "") -> Path:
    """Writes ``results.csv``, ``summary.md``, ``report.html`` and the figures from all records in the folder.

    Args:
        store (Store): The study's folder.
        study (str): The study's name.
        name (str): What the report calls the config.
        command (str, optional): What makes all of it once more, to be shown. Default: ``""``.

    Returns:
        Path: The summary's file.
    """
    store.write_table(study, "results.csv")
    path = store.folder / "summary.md"
    text = "\n".join(STUDIES[study].load().report(store, name)) + "\n"
    write_atomically(path, text)
    write_atomically(store.folder / "report.html", as_html(text, store.folder, command))
    return path
