"""The learning-rate study's figure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from composer_gradmatch.studies.figures import BAND, draw_lines, log_ticks, put_legend_below, save, start
from composer_gradmatch.studies.tables import Table

__all__ = ["draw_learning_rates"]


def draw_learning_rates(data: Table, path: Path, title: str) -> None:
    """Draws Figure 5: best test accuracy over the learning-rate factor β, a panel for each keep."""
    keeps = sorted(set(data.loc[data["strategy"] != "full", "keep"])) or [1.0]
    figure, (panels,) = start(1, len(keeps), sharey=True)
    full = data[data["strategy"] == "full"]
    for axes, keep in zip(panels, keeps, strict=True):
        draw_lines(
            axes,
            pd.concat([data[(data["keep"] == keep) & (data["strategy"] != "full")], full]),
            "factor",
            "best_accuracy",
        )
        axes.set_xscale("log")
        log_ticks(axes.xaxis, data["factor"].round(2))
        axes.tick_params(axis="x", labelsize=7)
        axes.set(xlabel="learning-rate factor β (epochs: T/β)", ylabel="best test accuracy", title=f"keep {keep:g}")
    put_legend_below(figure, panels)
    figure.suptitle(f"{title}\n{BAND}", fontsize=10)
    save(figure, path)
