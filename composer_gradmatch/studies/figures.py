"""The studies' figures, as PNG and PDF: readable in print, safe for the colour-blind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # Before pyplot is imported: a study draws files, with or without a display.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

from composer_gradmatch.studies.step_time import PARTS
from composer_gradmatch.studies.strategies import STRATEGIES

__all__ = ["draw_accuracy", "draw_accuracy_over_cost", "draw_gradient_errors", "draw_learning_rates", "draw_step_times"]

#: A DataFrame or Series: pandas' own annotations cannot tell which of them an index gives.
Table = Any
_COLOURS = dict(
    zip(
        ["gradmatch", "loss", "random", "selective_backprop", "gradmatch_reuse", "loss_reuse"],
        sns.color_palette("colorblind"),
        strict=False,
    )
)
_COLOURS["full"] = (0.25, 0.25, 0.25)
_MARKERS = {
    "gradmatch": "o",
    "loss": "s",
    "random": "^",
    "selective_backprop": "D",
    "gradmatch_reuse": "P",
    "loss_reuse": "v",
    "full": "X",
}
_BAND = "mean line, min-max band over seeds"


def _start(columns: int, width: float = 4.6, height: float = 3.6, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.1)
    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False, **kwargs)
    return figure, list(axes[0])


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=160, bbox_inches="tight")
    plt.close(figure)


def _log_ticks(axis: Any, values: Any) -> None:
    axis.set_major_formatter(ScalarFormatter())
    axis.set_ticks(sorted(set(values)), labels=[f"{value:g}" for value in sorted(set(values))])
    axis.set_ticks([], minor=True)


def _lines(axes: Axes, data: Table, x: str, y: str) -> None:
    present = [name for name in STRATEGIES if name in set(data["strategy"])]
    sns.lineplot(
        data,
        x=x,
        y=y,
        hue="strategy",
        style="strategy",
        hue_order=present,
        style_order=present,
        palette=_COLOURS,
        markers=_MARKERS,
        dashes=False,
        errorbar=("pi", 100),
        ax=axes,
    )


def _full_line(axes: Axes, full: Table) -> None:
    if len(full):
        axes.axhline(full.mean(), color=_COLOURS["full"], linestyle="--", label="full")
        axes.axhspan(full.min(), full.max(), color=_COLOURS["full"], alpha=0.12, linewidth=0)


def _legend_below(figure: Figure, panels: list[Axes]) -> None:
    """One legend for all panels, off the data."""
    handles, labels = panels[0].get_legend_handles_labels()
    for axes in panels:
        if legend := axes.get_legend():
            legend.remove()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels))


def draw_accuracy(data: Table, path: Path, title: str) -> None:
    """Figures 1, 2 and 4: test accuracy over keep, best over epochs and of the last one."""
    figure, panels = _start(2, sharey=True)
    full = data[data["strategy"] == "full"]
    rest = data[data["strategy"] != "full"]
    for axes, column, label in zip(
        panels, ("best_accuracy", "last_accuracy"), ("best epoch (max over epochs)", "last epoch"), strict=True
    ):
        if len(rest):
            _lines(axes, rest, "keep", column)
        _full_line(axes, full[column])
        if len(rest):
            axes.set_xscale("log")
            _log_ticks(axes.xaxis, rest["keep"])
        axes.set(xlabel="keep (fraction of the minibatch)", ylabel="test accuracy", title=label)
    _legend_below(figure, panels)
    figure.suptitle(f"{title}\n{_BAND}", fontsize=10)
    _save(figure, path)


def draw_accuracy_over_cost(data: Table, path: Path, title: str) -> None:
    """Test accuracy over the measured cost of training, with the full batch as the end of random's curve."""
    figure, panels = _start(2, sharey=True)
    full = data[data["strategy"] == "full"].assign(strategy="random")
    joined = pd.concat([data[data["strategy"] != "full"], full])
    for axes, column, label in zip(
        panels, ("best_accuracy", "last_accuracy"), ("best epoch (max over epochs)", "last epoch"), strict=True
    ):
        _lines(axes, joined, "cost", column)
        if len(full):
            axes.plot(1.0, full[column].mean(), marker="X", markersize=9, color=_COLOURS["full"], linestyle="none")
            axes.annotate("full", (1.0, full[column].mean()), (0, -12), textcoords="offset points", ha="center")
        axes.set(xlabel="measured time, share of the full batch's", ylabel="test accuracy", title=label)
    _legend_below(figure, panels)
    figure.suptitle(f"{title}\n{_BAND}", fontsize=10)
    _save(figure, path)


def draw_learning_rates(data: Table, path: Path, title: str) -> None:
    """Figure 5: best test accuracy over the learning-rate factor β, a panel for each keep."""
    keeps = sorted(set(data.loc[data["strategy"] != "full", "keep"])) or [1.0]
    figure, panels = _start(len(keeps), sharey=True)
    full = data[data["strategy"] == "full"]
    for axes, keep in zip(panels, keeps, strict=True):
        _lines(
            axes,
            pd.concat([data[(data["keep"] == keep) & (data["strategy"] != "full")], full]),
            "factor",
            "best_accuracy",
        )
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, data["factor"].round(2))
        axes.tick_params(axis="x", labelsize=7)
        axes.set(xlabel="learning-rate factor β (epochs: T/β)", ylabel="best test accuracy", title=f"keep {keep:g}")
    _legend_below(figure, panels)
    figure.suptitle(f"{title}\n{_BAND}", fontsize=10)
    _save(figure, path)


def draw_gradient_errors(data: Table, path: Path, title: str) -> None:
    """Figure 3: histograms of the squared error of all parameters' gradient, of the last layer's, and the cosine."""
    columns = {
        "squared_error": "squared L2 error, all parameters",
        "last_layer_squared_error": "squared L2 error, last layer",
        "cosine": "cosine, all parameters",
    }
    columns = {name: label for name, label in columns.items() if data[name].notna().any()}
    keeps = sorted(set(data.loc[data["strategy"] != "full", "keep"]))
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.1)
    figure, grid = plt.subplots(
        max(len(keeps), 1), len(columns), figsize=(4.4 * len(columns), 2.9 * max(len(keeps), 1)), squeeze=False
    )
    present = [name for name in STRATEGIES if name in set(data["strategy"])]
    handles, labels = [], []
    for row, keep in zip(grid, keeps or [1.0], strict=True):
        shown = data[(data["keep"] == keep) | (data["strategy"] == "full")]
        for axes, (column, label) in zip(row, columns.items(), strict=True):
            logarithmic = column != "cosine" and bool((shown[column] > 0).all())
            sns.histplot(
                shown,
                x=column,
                hue="strategy",
                hue_order=present,
                palette=_COLOURS,
                element="step",
                fill=True,
                alpha=0.2,
                bins=40,
                log_scale=logarithmic,
                stat="count",
                common_norm=False,
                ax=axes,
            )
            if logarithmic:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.tick_params(axis="x", labelsize=8, rotation=30)
            legend = axes.get_legend()
            handles, labels = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
            legend.remove()
            axes.set(
                xlabel=f"{label}{' (log scale)' if logarithmic else ''}", ylabel="minibatches", title=f"keep {keep:g}"
            )
    figure.suptitle(title, fontsize=10)
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels))
    _save(figure, path)


def draw_step_times(table: Table, parts: Table, path: Path, title: str) -> None:
    """Table 1 as a figure: a step's time relative to the full batch's, and the parts it is spent in.

    Args:
        table (pd.DataFrame): Columns strategy, keep, ratio, low, high, estimated_cost.
        parts (pd.DataFrame): Columns strategy, keep and a share of the full step for each part.
        path (Path): Without a suffix.
        title (str): Above the figure.
    """
    figure, (left, right) = _start(2, width=5.4, height=4.2)
    for name in [name for name in STRATEGIES if name in set(table["strategy"]) and name != "full"]:
        own = table[table["strategy"] == name].sort_values("keep")
        spread = np.abs(own[["low", "high"]].to_numpy().T - own["ratio"].to_numpy())
        style = {"color": _COLOURS[name], "marker": _MARKERS[name]}
        left.errorbar(own["keep"], own["ratio"], spread, label=name, capsize=3, **style)
    for label, offset, line in (("two passes, (M/3 + m)/M", 1 / 3, ":"), ("random, m/M", 0.0, "-.")):
        x = np.linspace(0, max(table.loc[table["strategy"] != "full", "keep"], default=1), 2)
        left.plot(x, x + offset, color="gray", linestyle=line, linewidth=1, label=f"cost model: {label}")
    left.axhline(1, color=_COLOURS["full"], linestyle="--", label="full")
    left.set(xlabel="keep (fraction of the minibatch)", ylabel="time per step / full batch's", ylim=(0, None))
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)

    labels = [row.strategy if row.strategy == "full" else f"{row.strategy} {row.keep:g}" for row in parts.itertuples()]
    start = np.zeros(len(parts))
    for part, colour in zip(PARTS, sns.color_palette("colorblind", len(PARTS)), strict=True):
        right.barh(
            labels,
            parts[part],
            left=start,
            color=colour,
            label=part.replace("_", " "),
            edgecolor="white",
            linewidth=0.2,
        )
        start = start + parts[part].to_numpy()
    right.invert_yaxis()
    right.set(xlabel="time per step / full batch's", ylabel="")
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=3)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
