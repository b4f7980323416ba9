"""The accuracy study's figures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from composer_gradmatch.studies.figures import (
    BAND,
    FULL,
    draw_full_line,
    draw_lines,
    log_ticks,
    put_legend_below,
    save,
    start,
)
from composer_gradmatch.studies.tables import Table

__all__ = ["draw_accuracy", "draw_accuracy_over_cost"]


def draw_accuracy(data: Table, path: Path, title: str) -> None:
    """Draws Figures 1, 2 and 4: test accuracy over keep, best over epochs and of the last one."""
    figure, (panels,) = start(1, 2, sharey=True)
    full = data[data["strategy"] == "full"]
    rest = data[data["strategy"] != "full"]
    for axes, column, label in zip(
        panels, ("best_accuracy", "last_accuracy"), ("best epoch (max over epochs)", "last epoch"), strict=True
    ):
        if len(rest):
            draw_lines(axes, rest, "keep", column)
        draw_full_line(axes, full[column])
        if len(rest):
            axes.set_xscale("log")
            log_ticks(axes.xaxis, rest["keep"])
        axes.set(xlabel="keep (fraction of the minibatch)", ylabel="test accuracy", title=label)
    put_legend_below(figure, panels)
    figure.suptitle(f"{title}\n{BAND}", fontsize=10)
    save(figure, path)


def draw_accuracy_over_cost(data: Table, path: Path, title: str) -> None:
    """Draws test accuracy over the measured cost of training, with the full batch as the end of random's curve."""
    figure, (panels,) = start(1, 2, sharey=True)
    full = data[data["strategy"] == "full"].assign(strategy="random")
    joined = pd.concat([data[data["strategy"] != "full"], full])
    for axes, column, label in zip(
        panels, ("best_accuracy", "last_accuracy"), ("best epoch (max over epochs)", "last epoch"), strict=True
    ):
        draw_lines(axes, joined, "cost", column)
        if len(full):
            axes.plot(1.0, full[column].mean(), marker=FULL.marker, markersize=9, color=FULL.color, linestyle="none")
            axes.annotate(FULL.name, (1.0, full[column].mean()), (0, -12), textcoords="offset points", ha="center")
        axes.set(xlabel="measured time, share of the full batch's", ylabel="test accuracy", title=label)
    put_legend_below(figure, panels)
    figure.suptitle(f"{title}\n{BAND}", fontsize=10)
    save(figure, path)
