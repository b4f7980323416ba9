"""The accuracy study's times to accuracy: within runs, from what each spent until each evaluation."""

from __future__ import annotations

from statistics import mean

from composer_gradmatch.studies.figures import save, start
from composer_gradmatch.studies.store import Store
from composer_gradmatch.studies.strategies import in_order, strategy_named
from composer_gradmatch.studies.tables import markdown
from composer_gradmatch.studies.time_to_accuracy import time_to_accuracy

__all__ = ["MARGIN", "time_lines"]

#: The accuracy to reach is this much below the full batch's at the end.
MARGIN = 0.005

Curve = tuple[list[float], list[float]]


def time_lines(store: Store, title: str) -> list[str]:
    """Draws accuracy over what was spent, and returns the lines of the summary; none without the full batch's runs.

    Costs are of the runs themselves, as shares of the full batch's run of the same seed; runs that went on several at a
    time have slowed each other down.
    """
    runs: dict[tuple[str, float], dict[int, Curve]] = {}
    for record in store.records("accuracy"):
        if seconds := record.details.get("training_seconds"):
            cell = (record.settings["strategy"], record.settings["keep"])
            runs.setdefault(cell, {})[record.settings["seed"]] = (record.details["accuracies"], seconds)
    full = runs.get(("full", 1.0))
    if not full:
        return []
    target = mean(accuracies[-1] for accuracies, _ in full.values()) - MARGIN
    curves = {
        cell: [
            (accuracies, [second / full[seed][1][-1] for second in seconds])
            for seed, (accuracies, seconds) in own.items()
            if seed in full
        ]
        for cell, own in runs.items()
    }
    curves = {cell: own for cell, own in curves.items() if own}
    _draw(curves, target, store, title)
    names = [strategy.name for strategy in in_order(name for name, _ in curves)]
    rows = []
    for strategy, keep in sorted(curves, key=lambda cell: (cell[1], names.index(cell[0]))):
        reached = time_to_accuracy(curves[strategy, keep], target)
        rows.append([strategy, f"{keep:g}", f"{reached.reached} of {reached.runs}", str(reached)])
    return [
        "## Time to accuracy",
        "",
        f"The cost, in whole runs of the full batch, at the first evaluation that reaches {target:.4f}, its accuracy "
        f"at the end minus {MARGIN:g}: median over seeds (earliest to latest). Times are the runs' own, of data, "
        "selection and steps; runs that were made several at a time on one machine have slowed each other down.",
        "",
        *markdown(["strategy", "keep", "runs that reach it", "cost"], rows),
    ]


def _draw(curves: dict[tuple[str, float], list[Curve]], target: float, store: Store, title: str) -> None:
    keeps = sorted({keep for _, keep in curves if keep < 1}) or [1.0]
    figure, (panels,) = start(1, len(keeps), sharey=True)
    for axes, panel_keep in zip(panels, keeps, strict=True):
        for (name, keep), own in curves.items():
            if keep in (panel_keep, 1.0):
                strategy = strategy_named(name)
                costs = [mean(each) for each in zip(*(costs for _, costs in own), strict=False)]
                accuracies = [mean(each) for each in zip(*(each for each, _ in own), strict=False)]
                axes.plot(costs, accuracies, color=strategy.color, marker=strategy.marker, markersize=3, label=name)
        axes.axhline(target, color="gray", linestyle=":", linewidth=1)
        axes.set(xlabel="training time so far, share of the full batch's", ylabel="test accuracy")
        axes.set_title(f"keep {panel_keep:g}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=max(1, len(labels)))
    figure.suptitle(f"{title}\nmeans over seeds; dotted: the accuracy to be reached", fontsize=10)
    save(figure, store.folder / "time_to_accuracy")
