"""The gradient-error study's figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import seaborn as sns
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from composer_gradmatch.studies.figures import save, start
from composer_gradmatch.studies.strategies import in_order
from composer_gradmatch.studies.tables import Table

__all__ = ["draw_gradient_errors"]


def draw_gradient_errors(data: Table, path: Path, title: str) -> None:
    """Draws Figure 3: histograms of the squared error of the whole gradient, of the last layer's, and of the cosine."""
    columns = {
        "squared_error": "squared L2 error, all parameters",
        "last_layer_squared_error": "squared L2 error, last layer",
        "cosine": "cosine, all parameters",
    }
    columns = {name: label for name, label in columns.items() if data[name].notna().any()}
    keeps = sorted(set(data.loc[data["strategy"] != "full", "keep"]))
    figure, grid = start(max(len(keeps), 1), len(columns), width=4.4, height=2.9)
    present = in_order(data["strategy"])
    handles: list[Any] = []
    labels: list[str] = []
    for row, keep in zip(grid, keeps or [1.0], strict=True):
        shown = data[(data["keep"] == keep) | (data["strategy"] == "full")]
        for axes, (column, label) in zip(row, columns.items(), strict=True):
            logarithmic = column != "cosine" and bool((shown[column] > 0).all())
            sns.histplot(
                shown,
                x=column,
                hue="strategy",
                hue_order=[strategy.name for strategy in present],
                palette={strategy.name: strategy.color for strategy in present},
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
            assert legend is not None
            handles, labels = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
            legend.remove()
            axes.set(
                xlabel=f"{label}{' (log scale)' if logarithmic else ''}", ylabel="minibatches", title=f"keep {keep:g}"
            )
    figure.suptitle(title, fontsize=10)
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels))
    save(figure, path)
