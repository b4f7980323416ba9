"""The verdict's figures: accuracy over cost at the end of training, and within it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from composer_gradmatch.studies.figures import FULL, put_legend_below, save, start
from composer_gradmatch.studies.strategies import strategy_named

__all__ = ["draw_curves", "draw_frontier"]


def draw_frontier(found: dict[str, Any], path: Path, title: str) -> None:
    """Draws each candidate at its cost and accuracy, with intervals, the frontier, and the margin below the full batch.

    Args:
        found (dict[str, Any]): What is in ``verdict.json``.
        path (Path): Without a suffix.
        title (str): Of the figure.
    """
    figure, ((axes,),) = start(1, 1, width=7.0, height=4.4)
    full, margin = found["full"]["accuracy"], found["margin"]
    axes.axhspan(full - margin, full, color=FULL.color, alpha=0.10, linewidth=0, label=f"margin of {margin:g}")
    axes.axhline(full, color=FULL.color, linestyle="--", linewidth=1)
    axes.plot(1.0, full, marker=FULL.marker, markersize=9, color=FULL.color, linestyle="none", label="full")
    points = [(1.0, full)]
    named: set[str] = set()
    for each in found["candidates"]:
        if each["minus_full"] is None:
            continue
        strategy, cost, difference = strategy_named(each["strategy"]), each["cost"], each["minus_full"]
        height = full + difference["mean"]
        points.append((cost["mean"], height))
        axes.errorbar(
            cost["mean"],
            height,
            yerr=None
            if difference["low"] is None
            else [[difference["mean"] - difference["low"]], [difference["high"] - difference["mean"]]],
            xerr=[[cost["mean"] - cost["low"]], [cost["high"] - cost["mean"]]],
            marker=strategy.marker,
            linestyle="none",
            markersize=8,
            capsize=3,
            color=strategy.color,
            markerfacecolor=strategy.color if each["against_full"] in ("better", "non-inferior") else "white",
            label=None if each["strategy"] in named else each["strategy"],
        )
        named.add(each["strategy"])
        axes.annotate(f"{each['keep']:g}", (cost["mean"], height), (7, 5), textcoords="offset points", fontsize=8)
    frontier = _frontier(points)
    axes.step(
        [cost for cost, _ in frontier],
        [height for _, height in frontier],
        where="post",
        color="gray",
        linestyle=":",
        label="frontier",
        zorder=0,
    )
    axes.set(xlabel="training time, share of the full batch's", ylabel="test accuracy", title=title)
    axes.set_xlim(left=0)
    _end_at_one(axes, [height for _, height in points])
    put_legend_below(figure, [axes])
    save(figure, path)


def _end_at_one(axes: Axes, heights: list[float]) -> None:
    """Leaves out what of the intervals lies beyond an accuracy of 1."""
    low, high = axes.get_ylim()
    if max(heights) <= 1 < high:
        axes.set_ylim(low, 1 + 0.02 * (1 - low))


def _frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Gives the points that nothing cheaper is as accurate as, by cost."""
    best: list[tuple[float, float]] = []
    for cost, height in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or height > best[-1][1]:
            best.append((cost, height))
    return best


def draw_curves(found: dict[str, Any], path: Path, title: str) -> None:
    """Draws accuracy over what was spent within a run, means over seeds, and the accuracy to be reached."""
    figure, ((axes,),) = start(1, 1, width=7.0, height=4.4)
    styles = ("-", "--", ":", "-.")
    keeps = sorted({each["keep"] for each in found["candidates"]})
    rows = [{"strategy": "full", "keep": 1.0, **found["full"]}, *found["candidates"]]
    for each in rows:
        if each["curve"]["cost"]:
            strategy = strategy_named(each["strategy"])
            full = each["strategy"] == "full"
            axes.plot(
                each["curve"]["cost"],
                each["curve"]["accuracy"],
                color=strategy.color,
                linestyle="-" if full else styles[keeps.index(each["keep"]) % len(styles)],
                marker=strategy.marker,
                markersize=4,
                label="full" if full else f"{each['strategy']} {each['keep']:g}",
            )
    target = found["target_accuracy"]
    axes.axhline(target, color="gray", linewidth=1, linestyle=":", label="full minus margin")
    heights = [value for each in rows for value in each["curve"]["accuracy"]]
    # There is none where the choice of rates has taken the whole budget.
    heights = heights or [target + found["margin"]]
    # The first epochs are far below, and what is to be told apart is at the top.
    bottom = max(min(heights), target - 6 * max(max(heights) - target, found["margin"]))
    bottom = min(bottom, target)
    axes.set_ylim(bottom, max(heights) + max(0.05 * (max(heights) - bottom), 0.1 * found["margin"]))
    axes.set(xlabel="training time so far, share of the full batch's", ylabel="test accuracy", title=title)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
    save(figure, path)
