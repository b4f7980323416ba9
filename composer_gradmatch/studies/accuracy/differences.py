"""The accuracy study's differences: of a strategy at one keep to random at equal keep, and at equal cost."""

from __future__ import annotations

import pandas as pd

from composer_gradmatch.studies.statistics import Difference, compare_at_cost, compare_paired
from composer_gradmatch.studies.tables import Table, cell_order

__all__ = ["COLUMNS", "Costs", "at_equal_cost", "by_seed", "comparisons", "paired_with"]

#: (strategy, keep) → measured cost, and its interval.
Costs = dict[tuple[str, float], tuple[float, float, float]]
#: What accuracies are told of → their columns.
COLUMNS = {"best": "best_accuracy", "last": "last_accuracy"}


def by_seed(data: Table, strategy: str, keep: float, column: str) -> Table:
    """Gives a column of a cell, by seed."""
    own = data[(data["strategy"] == strategy) & (data["keep"] == keep)]
    return own.set_index("seed")[column].astype(float)


def paired_with(data: Table, cell: tuple[str, float], other: tuple[str, float], column: str) -> Difference:
    """Gives the difference of a cell (strategy, keep) to another one over the seeds that both have."""
    difference = by_seed(data, *cell, column) - by_seed(data, *other, column)
    return compare_paired(difference.dropna().tolist())


def at_equal_cost(data: Table, cell: tuple[str, float], costs: Costs, column: str) -> Difference | None:
    """Gives the difference of a cell to random's curve at the cell's own measured cost; None if it cannot be told."""
    keeps = sorted(set(data.loc[data["strategy"] == "random", "keep"]))
    points = [("random", keep) for keep in keeps] + [("full", 1.0)]
    points = [point for point in points if point in costs and len(by_seed(data, *point, column))]
    if cell not in costs or len(points) < 2:
        return None
    table = pd.concat([by_seed(data, *point, column) for point in points], axis=1).dropna()
    own = by_seed(data, *cell, column)
    seeds = [seed for seed in own.index if seed in table.index]
    curve_costs = [costs[point][0] for point in points]
    return compare_at_cost(own[seeds].tolist(), costs[cell], curve_costs, table.loc[seeds].to_numpy().tolist())


def comparisons(data: Table, costs: Costs) -> Table:
    """Gives a row of numbers for each cell: accuracies, cost, and differences with both ends of their intervals.

    Args:
        data (pd.DataFrame): Of the runs.
        costs (Costs): Measured.
    """
    rows = []
    for strategy, keep in cell_order(data):
        cost = costs.get((strategy, keep), (None,) * 3)
        row = {"strategy": strategy, "keep": keep, "runs": len(by_seed(data, strategy, keep, "last_accuracy"))}
        for label, column in COLUMNS.items():
            own = by_seed(data, strategy, keep, column)
            row |= {f"{label}_accuracy": own.mean(), f"{label}_accuracy_min": own.min()}
            row |= {f"{label}_accuracy_max": own.max()}
        row |= dict(zip(("cost", "cost_low", "cost_high"), cost, strict=True))
        if strategy != "full":
            for label, column in COLUMNS.items():
                row |= _numbers(f"{label}_minus_full", paired_with(data, (strategy, keep), ("full", 1.0), column))
        if strategy not in ("full", "random"):
            for label, column in COLUMNS.items():
                equal_keep = paired_with(data, (strategy, keep), ("random", keep), column)
                row |= _numbers(f"{label}_minus_random_equal_keep", equal_keep)
                equal_cost = at_equal_cost(data, (strategy, keep), costs, column)
                row |= _numbers(f"{label}_minus_random_equal_cost", equal_cost)
        rows.append(row)
    return pd.DataFrame(rows)


def _numbers(name: str, difference: Difference | None) -> dict[str, float | None]:
    if difference is None or not difference.pairs:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: difference.mean, f"{name}_low": difference.low, f"{name}_high": difference.high}
