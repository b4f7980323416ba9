"""What the studies' figures share: PNG and PDF, readable in print, safe for the colour-blind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from composer_gradmatch.studies.strategies import STRATEGIES, in_order
from composer_gradmatch.studies.tables import Table

__all__ = [
    "BAND",
    "FULL",
    "collecting",
    "draw_full_line",
    "draw_lines",
    "log_ticks",
    "put_legend_below",
    "save",
    "start",
]

#: What lines between seeds show, for a title.
BAND = "mean line, min-max band over seeds"
#: How the full batch is drawn.
FULL = STRATEGIES["full"]

_collected: ContextVar[dict[str, Figure] | None] = ContextVar("_collected", default=None)


@contextmanager
def collecting() -> Iterator[dict[str, Figure]]:
    """Gives the figures that are saved within, by their names; a notebook's own style is left as it is."""
    figures: dict[str, Figure] = {}
    token = _collected.set(figures)
    try:
        with mpl.rc_context():
            yield figures
    finally:
        _collected.reset(token)


def start(
    rows: int, columns: int, width: float = 4.6, height: float = 3.6, sharey: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """Starts a figure: its panels, row by row, each of a width and a height in inches."""
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.1)
    # Not by pyplot, which would show it in a notebook, and asks for a display elsewhere.
    figure = Figure(figsize=(width * columns, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, [list(row) for row in grid]


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and PDF; ``path`` is without a suffix."""
    figures = _collected.get()
    if figures is not None:
        figures[path.name] = figure
    figure.tight_layout()
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=160, bbox_inches="tight")


def log_ticks(axis: Any, values: Any) -> None:
    """Puts the ticks of a logarithmic axis at the values that are there."""
    axis.set_major_formatter(ScalarFormatter())
    axis.set_ticks(sorted(set(values)), labels=[f"{value:g}" for value in sorted(set(values))])
    axis.set_ticks([], minor=True)


def draw_lines(axes: Axes, data: Table, x: str, y: str) -> None:
    """Draws a line for each strategy, through its means over seeds."""
    present = in_order(data["strategy"])
    names = [strategy.name for strategy in present]
    sns.lineplot(
        data,
        x=x,
        y=y,
        hue="strategy",
        style="strategy",
        hue_order=names,
        style_order=names,
        palette={strategy.name: strategy.color for strategy in present},
        markers={strategy.name: strategy.marker for strategy in present},
        dashes=False,
        errorbar=("pi", 100),
        ax=axes,
    )


def draw_full_line(axes: Axes, full: Table) -> None:
    """Draws the full batch's mean, and its range over seeds, across the panel."""
    if len(full):
        axes.axhline(full.mean(), color=FULL.color, linestyle="--", label=FULL.name)
        axes.axhspan(full.min(), full.max(), color=FULL.color, alpha=0.12, linewidth=0)


def put_legend_below(figure: Figure, panels: list[Axes]) -> None:
    """Puts one legend for all panels below them, off the data."""
    handles, labels = panels[0].get_legend_handles_labels()
    for axes in panels:
        if legend := axes.get_legend():
            legend.remove()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels))
