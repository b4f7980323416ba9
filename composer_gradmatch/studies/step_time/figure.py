"""The step-time study's figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import seaborn as sns

from composer_gradmatch.rules.cost import Passes, step_cost
from composer_gradmatch.studies.figures import FULL, save, start
from composer_gradmatch.studies.step_time.timer import PARTS
from composer_gradmatch.studies.strategies import in_order
from composer_gradmatch.studies.tables import Table

__all__ = ["draw_step_times"]


def draw_step_times(table: Table, parts: Table, path: Path, title: str) -> None:
    """Draws Table 1 as a figure: a step's time relative to the full batch's, and the parts it is spent in.

    Args:
        table (pd.DataFrame): Columns strategy, keep, ratio, low and high.
        parts (pd.DataFrame): Columns strategy, keep and a share of the full step for each part.
        path (Path): Without a suffix.
        title (str): Above the figure.
    """
    figure, ((left, right),) = start(1, 2, width=5.4, height=4.2)
    for strategy in in_order(table["strategy"]):
        if strategy == FULL:
            continue
        own = table[table["strategy"] == strategy.name].sort_values("keep")
        spread = np.abs(own[["low", "high"]].to_numpy().T - own["ratio"].to_numpy())
        left.errorbar(
            own["keep"],
            own["ratio"],
            spread,
            label=strategy.name,
            capsize=3,
            color=strategy.color,
            marker=strategy.marker,
        )
    keeps = np.linspace(0, max(table.loc[table["strategy"] != "full", "keep"], default=1), 2)
    models: list[tuple[str, Passes, str]] = [("two passes, (M/3 + m)/M", 2, ":"), ("random, m/M", 0, "-.")]
    for label, passes, line in models:
        costs = [step_cost(passes, keep) for keep in keeps]
        left.plot(keeps, costs, color="gray", linestyle=line, linewidth=1, label=f"cost model: {label}")
    left.axhline(1, color=FULL.color, linestyle="--", label=FULL.name)
    left.set(xlabel="keep (fraction of the minibatch)", ylabel="time per step / full batch's", ylim=(0, None))
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)

    labels = [row.strategy if row.strategy == "full" else f"{row.strategy} {row.keep:g}" for row in parts.itertuples()]
    left_end = np.zeros(len(parts))
    for part, colour in zip(PARTS, sns.color_palette("colorblind", len(PARTS)), strict=True):
        right.barh(
            labels,
            parts[part],
            left=left_end,
            color=colour,
            label=part.replace("_", " "),
            edgecolor="white",
            linewidth=0.2,
        )
        left_end = left_end + parts[part].to_numpy()
    right.invert_yaxis()
    right.set(xlabel="time per step / full batch's", ylabel="")
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=3)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
