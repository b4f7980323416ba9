"""The tables of what errors are made of."""

from __future__ import annotations

import pandas as pd

from composer_gradmatch.studies.gradient_error.looks import STORE_COST, break_evens, pays_with
from composer_gradmatch.studies.tables import Table, cell_order, markdown

__all__ = ["mean_over_seeds", "moment", "report_parts"]

#: What is told of an error, beside its standard errors.
VALUES = ["relative_error", "bias", "over_minibatches", "over_draws", "step_length"]
_TITLES = {"all": "All parameters", "last layer": "The last layer", "below": "Below the last layer"}


def moment(after: int) -> str:
    """Says after how many epochs, in words."""
    return "at the start" if after == 0 else f"after {after} epoch{'s' if after > 1 else ''}"


def mean_over_seeds(data: Table) -> Table:
    """Averages over seeds; a mean's standard error is that of minibatches and draws, not of the networks.

    Args:
        data (Table): Rows of :class:`.ErrorParts`, with ``seed``, ``after``, ``strategy`` and ``keep``.

    Returns:
        Table: By (after, parameters, strategy, keep).
    """
    errors = [f"{name}_se" for name in VALUES]
    data = data.assign(**{name: data[name] ** 2 for name in errors})
    groups = data.groupby(["after", "parameters", "strategy", "keep"])
    means = groups[[*VALUES, "picks", "batch_size"]].mean()
    squares, counts = groups[errors].sum(min_count=1), groups.size()
    return pd.concat([means, squares.pow(0.5).div(counts, axis=0)], axis=1)


def report_parts(data: Table) -> list[str]:
    """Gives the summary's lines on what errors against the minibatch's gradient are made of."""
    first, seeds = data.iloc[0], data["seed"].nunique()
    means = mean_over_seeds(data)
    lines = [
        "## What the error is made of",
        "",
        "Squared error against the minibatch's own gradient, relative to that of as many random picks: r = bias² + "
        "variance over minibatches + variance over draws. Bias² does not average out over steps. *Length* is that of "
        "the step along the minibatch's gradient; 1 is right. From explicit gradients of each sample, model in "
        f"evaluation mode, BatchNorm's statistics estimated anew; {seeds} seeds of {first['minibatches']} minibatches "
        f"of {first['draws']} draws, trained on the full batch. ± is one standard error of minibatches and draws.",
        "",
        f"*Pays* names the costliest look with which r is below r* by two standard errors: two passes, one pass, or a "
        f"store ({STORE_COST:.0%} of a step). Strategies that look at nothing are held against 1.",
        "",
    ]
    shares = data.groupby("keep")[["picks", "batch_size"]].first()
    limits = {keep: break_evens(row["picks"] / row["batch_size"]) for keep, row in shares.iterrows()}
    names = next(iter(limits.values()))
    rows = [[f"{keep:g}", *(f"{limit:.2f}" for limit in each.values())] for keep, each in limits.items()]
    lines += markdown(["keep", *(f"r*, {name}" for name in names)], rows)
    for group, title in _TITLES.items():
        own = data[data["parameters"] == group]
        if len(own):
            lines += [f"### {title}", "", *_table(own, means, group)]
    return lines


def _table(data: Table, means: Table, group: str) -> list[str]:
    afters = sorted(set(data["after"]))
    head = ["keep", "strategy"]
    for after in afters:
        head += [f"{moment(after)}: r = bias² + minibatches + draws", "length", "pays"]
    rows = []
    for strategy, keep in cell_order(data):
        row = [f"{keep:g}", strategy]
        for after in afters:
            key = (after, group, strategy, keep)
            row += _cells(strategy, means.loc[key]) if key in means.index else ["", "", ""]
        rows.append(row)
    return markdown(head, rows)


def _cells(strategy: str, mean: Table) -> list[str]:
    parts = " + ".join(_number(mean[name]) for name in ("bias", "over_minibatches", "over_draws"))
    error, spread = mean["relative_error"], mean["relative_error_se"]
    pays = pays_with(strategy, mean["picks"] / mean["batch_size"], error, spread)
    return [f"{_number(error)} ± {_number(spread)} = {parts}", _number(mean["step_length"]), pays]


def _number(value: float) -> str:
    """Writes a number with more digits behind the point the smaller it is, and zero as 0."""
    digits = 3 if abs(value) < 0.1 else 2 if abs(value) < 10 else 1
    return "0" if round(value, digits) == 0 else f"{value:.{digits}f}"
