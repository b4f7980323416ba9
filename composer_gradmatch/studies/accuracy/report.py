"""The accuracy study's report: at equal keep, and at equal cost."""

from __future__ import annotations

from typing import Any

from composer_gradmatch.studies.accuracy.differences import (
    COLUMNS,
    Costs,
    at_equal_cost,
    by_seed,
    comparisons,
    paired_with,
)
from composer_gradmatch.studies.accuracy.figures import draw_accuracy, draw_accuracy_over_cost
from composer_gradmatch.studies.accuracy.times import time_lines
from composer_gradmatch.studies.statistics import Difference, what_seeds_can_tell
from composer_gradmatch.studies.store import Store, write_atomically
from composer_gradmatch.studies.strategies import strategy_named
from composer_gradmatch.studies.tables import Table, cell_order, conditions, frame, markdown, measured_costs, range_of

__all__ = ["report_accuracy"]


def report_accuracy(store: Store, name: str) -> list[str]:
    """Writes the tables of costs and of comparisons, draws the figures and returns the summary's lines."""
    store.write_table("step-time", "costs.csv")
    data = frame(store.records("accuracy"))
    lines = [f"# Accuracy study of {name}", "", *conditions(store, "accuracy"), ""]
    if data.empty:
        return [*lines, "No run succeeded: there is nothing to compare."]
    costs = measured_costs(store)
    write_atomically(store.folder / "comparisons.csv", comparisons(data, costs).to_csv(index=False))
    cells = cell_order(data)
    noise, batch_size = data["label_noise"].iloc[0], data["batch_size"].iloc[0]
    title = f"{name}, label noise {noise:.0%}, {batch_size} batch size, {data['seed'].nunique()} seeds"
    lines += [
        f"Label noise {noise:.0%}, {batch_size} batch size, budget counted in forward passes. *Best* is the maximum "
        "over epochs on the test set, as in the paper, and so optimistic; *last* is the last epoch. Differences are "
        "paired by seed, with Student's 95 % intervals.",
        "",
        "## Accuracy",
        "",
    ]
    rows = []
    for cell in cells:
        own = data[(data["strategy"] == cell[0]) & (data["keep"] == cell[1])]
        ranges = [range_of(own[column]) for column in COLUMNS.values()]
        versus = ["" if cell[0] == "full" else str(paired_with(data, cell, ("full", 1.0), "last_accuracy"))]
        rows.append([cell[0], f"{cell[1]:g}", len(own), *ranges, *versus])
    head = ["strategy", "keep", "runs", "best: mean (min to max)", "last: mean (min to max)", "last: minus full batch"]
    lines += markdown(head, rows)

    compared = [cell for cell in cells if cell[0] not in ("random", "full")]
    verdicts, differences = [], []
    tables: dict[str, list[list[Any]]] = {column: [] for column in COLUMNS}
    for cell in compared:
        cost = costs.get(cell)
        shown = f"{cost[0]:.2f} ({cost[1]:.2f} to {cost[2]:.2f})" if cost else "not measured"
        words = []
        for label, column in COLUMNS.items():
            equal_keep = paired_with(data, cell, ("random", cell[1]), column)
            equal_cost = at_equal_cost(data, cell, costs, column)
            differences += [equal_keep, *([] if equal_cost is None else [equal_cost])]
            tables[label].append([cell[0], f"{cell[1]:g}", *_shown(equal_keep), shown, *_shown(equal_cost)])
            words.append(f"{label} epoch: {_word(equal_keep)} at equal keep, {_word(equal_cost)} at equal cost")
        time = f"{cost[0]:.0%} of the full batch's time" if cost else "cost not measured"
        verdicts.append(
            f"- **{cell[0]} at keep {cell[1]:g}** ({time}), against random: {'; '.join(words)}."
            f"{_cheaper_random(data, cell, costs)}"
        )
    lines += ["## Verdict", "", *verdicts, ""]
    lines += what_seeds_can_tell(int(data["seed"].nunique()), differences)
    head = ["strategy", "keep", "minus random at equal keep", "verdict", "measured cost", "minus random at equal cost"]
    for label, table in tables.items():
        lines += [f"## Against random, {label} epoch", "", *markdown([*head, "verdict"], table)]
    lines += [
        "*Measured cost* is the median time of a step for a sample of the minibatch, with selection, as a share of the "
        "full batch's (95 % interval of the median), measured alone on the machine and interleaved; data loading is "
        "not in it. *At equal cost* reads random's curve (its last point is the full batch, at cost 1) at that cost; "
        "its interval also covers the cost's interval and linear or logarithmic interpolation. What costs more than "
        "the full batch is compared with the full batch.",
        "",
    ]
    lines += time_lines(store, title)
    if costs:
        lines += _cost_table(data, costs)
    lines += _rate_table(store, data)
    draw_accuracy(data, store.folder / "accuracy", title)
    priced = data.assign(
        cost=[costs.get((s, k), (float("nan"),))[0] for s, k in zip(data["strategy"], data["keep"], strict=True)]
    ).dropna(subset=["cost"])
    if not priced.empty:
        draw_accuracy_over_cost(priced, store.folder / "accuracy_over_cost", title)
    return lines


def _cheaper_random(data: Table, cell: tuple[str, float], costs: Costs) -> str:
    """Says so if random reaches the cell's mean accuracy at a lower cost: its curve need not rise with cost."""
    own = by_seed(data, *cell, "last_accuracy").mean()
    cheaper = [
        (cost[0], other)
        for other, cost in costs.items()
        if other[0] == "random" and cell in costs and cost[2] < costs[cell][1]
        if by_seed(data, *other, "last_accuracy").mean() >= own
    ]
    if not cheaper:
        return ""
    cost, (_, keep) = min(cheaper)
    return f" Random at keep {keep:g} was at least as accurate in the last epoch on average, for {cost:.0%} of it."


def _rate_table(store: Store, data: Table) -> list[str]:
    """Says which learning rates were chosen, and by what effort, if they were."""
    if "rate" not in data:
        return []
    effort: dict[tuple[str, float], list[float]] = {}
    for record in store.records("tuning"):
        effort.setdefault((record.settings["strategy"], record.settings["keep"]), []).append(record.seconds)
    rows = []
    for cell in cell_order(data):
        own = data[(data["strategy"] == cell[0]) & (data["keep"] == cell[1])]
        seconds = effort.get(cell, [])
        rows.append([cell[0], f"{cell[1]:g}", f"{own['rate'].iloc[0]:g}", len(seconds), f"{sum(seconds):.0f} s"])
    return [
        "## Learning rates",
        "",
        "Chosen for each strategy and keep by successive halving over seeds, on a validation part of the training set, "
        "with the same effort for each.",
        "",
        *markdown(["strategy", "keep", "lr", "runs", "time"], rows),
    ]


def _cost_table(data: Table, costs: Costs) -> list[str]:
    rows = []
    for cell in cell_order(data):
        if cell in costs:
            median, low, high = costs[cell]
            model = f"{strategy_named(cell[0]).cost(cell[1]):.2f}"
            rows.append([cell[0], f"{cell[1]:g}", f"{median:.2f}", f"{low:.2f} to {high:.2f}", model])
    return ["## Cost", "", *markdown(["strategy", "keep", "measured", "95 % interval", "cost model"], rows)]


def _word(difference: Difference | None) -> str:
    if difference is None or difference.pairs == 0:
        return "nothing to compare with"
    if difference.low != difference.low:
        return "not distinguishable (no spread between seeds to judge by)"
    return f"{difference.verdict} ({round(difference.mean, 4) + 0.0:+.4f})"


def _shown(difference: Difference | None) -> list[str]:
    if difference is None or difference.pairs == 0:
        return ["", "nothing to compare with"]
    return [str(difference), difference.verdict]
