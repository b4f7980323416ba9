"""The figure of what errors are made of, each rule against the lines of break-even."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from composer_gradmatch.studies.figures import save, start
from composer_gradmatch.studies.gradient_error.looks import break_evens
from composer_gradmatch.studies.gradient_error.parts_report import mean_over_seeds, moment
from composer_gradmatch.studies.strategies import in_order
from composer_gradmatch.studies.tables import Table

__all__ = ["draw_error_parts"]

#: The parts, from the axis on, and their colours: dark is what does not average out.
_PARTS = {
    "bias": ("bias²", "#7a0403"),
    "over_minibatches": ("variance over minibatches", "#f0a860"),
    "over_draws": ("variance over draws", "#a8cbe6"),
}
_LINES = {"two passes": ":", "one pass": "--", "a store": "-."}
#: Where the axis ends; longer bars are cut, with their number.
_END = 1.6


def draw_error_parts(data: Table, path: Path, name: str) -> None:
    """Draws a panel for each keep and number of epochs: bars of r over all parameters, split, and lines of r*."""
    data = data[data["parameters"] == "all"]
    means = mean_over_seeds(data)
    keeps, afters = sorted(set(data["keep"])), sorted(set(data["after"]))
    strategies = in_order(data["strategy"])
    height = 0.8 + 0.19 * len(strategies)
    figure, grid = start(len(afters), len(keeps), width=3.6, height=height, sharey=True)
    for after, row in zip(afters, grid, strict=True):
        for keep, axes in zip(keeps, row, strict=True):
            for place, strategy in enumerate(strategies):
                key = (after, "all", strategy.name, keep)
                if key in means.index:
                    _draw_bar(axes, place, means.loc[key])
            axes.set_yticks(range(len(strategies)), [strategy.name for strategy in strategies])
            axes.set(xlim=(0, _END), ylim=(len(strategies) - 0.4, -0.6))
            axes.grid(visible=False, axis="y")
            share = data.loc[data["keep"] == keep, "picks"].iloc[0] / data["batch_size"].iloc[0]
            for look, limit in break_evens(share).items():
                axes.axvline(limit, color="black", linestyle=_LINES[look], linewidth=1.1)
            axes.axvline(1, color="#808080", linewidth=1)
            axes.set_title(f"keep {keep:g}, {moment(after)}", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("r")
    handles: list[Any] = [Patch(color=color, label=label) for label, color in _PARTS.values()]
    lines = dict(zip(_LINES, grid[0][0].lines[: len(_LINES)], strict=True))
    figure.suptitle(f"{name}: r, the squared error relative to as many random picks', all parameters", fontsize=11)
    labels = [label for label, _ in _PARTS.values()] + [f"break-even, {look}" for look in lines]
    figure.legend([*handles, *lines.values()], labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3)
    save(figure, path)


def _draw_bar(axes: Any, place: int, mean: Table) -> None:
    total, left, reached = float(mean["relative_error"]), 0.0, 0.0
    for part, (_, color) in _PARTS.items():
        # Estimates without bias of what is zero are at times below it: bars still end at r.
        reached += float(mean[part])
        right = total if part == "over_draws" else min(max(reached, left), total)
        axes.barh(place, right - left, left=left, color=color, height=0.75, linewidth=0)
        left = right
    if total > _END:
        text = f"{total:.1f}" if total < 100 else f"{total:.0f}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(_END * 0.985, place, text, ha="right", va="center", fontsize=7, bbox=box)
