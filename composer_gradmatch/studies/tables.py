"""What the reports share: results as tables, the conditions they were made under, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import pandas as pd

from composer_gradmatch.studies.statistics import interval_of_median
from composer_gradmatch.studies.store import Record, Store
from composer_gradmatch.studies.strategies import STRATEGIES, in_order

__all__ = ["Table", "cell_order", "conditions", "frame", "markdown", "measured_costs", "range_of"]

#: A DataFrame or Series: pandas' own annotations cannot tell which of them an index gives.
Table = Any


def frame(records: Sequence[Record]) -> Table:
    """Gives a row for each result of the runs that succeeded."""
    return pd.DataFrame([{**record.settings, **row} for record in records for row in record.rows])


def conditions(store: Store, kind: str) -> list[str]:
    """Lines that say on what the runs were made, and which of them failed."""
    records = store.records(kind)
    failed = [record for record in records if record.error]
    made = sorted({_describe(record.provenance) for record in records})
    lines = [f"{len(records) - len(failed)} runs succeeded, {len(failed)} failed. Made with:", ""]
    lines += [f"- {text}" for text in made]
    if len(made) > 1:
        lines += ["", "**The runs were not all made under the same conditions.**"]
    if failed:
        lines += ["", "Failed:", ""]
        for record in failed:
            settings = ", ".join(f"{key} {value}" for key, value in record.settings.items())
            lines.append(f"- {settings}: {record.error.splitlines()[0]}")
    return lines


def _describe(provenance: dict[str, str]) -> str:
    versions = [f"{k.removesuffix(' version')} {v}" for k, v in provenance.items() if k.endswith(" version")]
    machine, python, revision = (provenance[key] for key in ("machine", "python", "git revision"))
    return f"{machine}; Python {python}, {', '.join(versions)}; git revision {revision}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Gives a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*lines, *("| " + " | ".join(str(value) for value in row) + " |" for row in rows), ""]


def range_of(values: Sequence[float], digits: int = 4) -> str:
    """Writes mean and range, e.g. ``0.9912 (0.9889 to 0.9944)``."""
    series = pd.Series(values, dtype=float)
    return f"{series.mean():.{digits}f} ({series.min():.{digits}f} to {series.max():.{digits}f})"


def cell_order(data: Table) -> list[tuple[str, float]]:
    """Gives the pairs (strategy, keep) of a table, keep by keep, the full batch last."""
    pairs = set(zip(data["strategy"], data["keep"], strict=True))
    order = {strategy.name: place for place, strategy in enumerate(in_order(data["strategy"]))}
    return sorted(pairs, key=lambda pair: (pair[0] == "full", pair[1], order[pair[0]]))


def measured_costs(store: Store) -> dict[tuple[str, float], tuple[float, float, float]]:
    """Finds (strategy, keep) → median share of the full batch's time a sample, and its 95 % interval.

    Of steps that were timed in turn; of strategies with stored looks, whose steps are not alike, of whole runs'
    training time, relative to the full batch's run of the same seed.
    """
    costs = _costs_of_runs(store)
    data = frame(store.records("step-time"))
    if data.empty:
        return costs
    data = data[data["measured"] == "step"]
    for (strategy, keep), group in data.groupby(["strategy", "keep"]):
        low, high = interval_of_median(group["ratio"])
        costs[str(strategy), float(keep)] = (float(group["ratio"].median()), low, high)
    return costs


def _costs_of_runs(store: Store) -> dict[tuple[str, float], tuple[float, float, float]]:
    seconds: dict[tuple[str, float], dict[int, float]] = {}
    for record in store.records("accuracy"):
        if trained := record.details.get("training_seconds"):
            cell = record.settings["strategy"], record.settings["keep"]
            seconds.setdefault(cell, {})[record.settings["seed"]] = trained[-1]
    full = seconds.get(("full", 1.0), {})
    costs = {}
    for (strategy, keep), own in seconds.items():
        ratios = [trained / full[seed] for seed, trained in own.items() if seed in full]
        if ratios and strategy in STRATEGIES and STRATEGIES[strategy].is_stored:
            costs[strategy, keep] = (median(ratios), *interval_of_median(ratios))
    return costs
