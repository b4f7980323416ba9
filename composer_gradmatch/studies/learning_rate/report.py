"""The learning-rate study's report."""

from __future__ import annotations

from composer_gradmatch.studies.learning_rate.figure import draw_learning_rates
from composer_gradmatch.studies.statistics import compare_paired, what_seeds_can_tell
from composer_gradmatch.studies.store import Store
from composer_gradmatch.studies.tables import cell_order, conditions, frame, markdown, range_of

__all__ = ["report_learning_rate"]


def report_learning_rate(store: Store, name: str) -> list[str]:
    """Draws Figure 5 and returns the summary's lines."""
    data = frame(store.records("learning-rate"))
    lines = [f"# Learning-rate study of {name}", "", *conditions(store, "learning-rate"), ""]
    if data.empty:
        return [*lines, "No run succeeded: there is nothing to compare."]
    noise = data["label_noise"].iloc[0]
    lines += [
        f"Label noise {noise:.0%}. A factor β scales the learning rate and stretches the schedule to T/β epochs "
        "(App. C.4), so a small β also trains longer. Accuracies are the maximum over epochs on the test set, as in "
        "the paper; the best β is chosen on the same test set, which flatters every strategy.",
        "",
    ]
    by_factor = []
    best: dict[tuple[str, float], float] = {}
    for cell in cell_order(data):
        own = data[(data["strategy"] == cell[0]) & (data["keep"] == cell[1])]
        means = own.groupby("factor")["best_accuracy"].mean()
        best[cell] = float(means.idxmax())
        for factor, group in own.groupby("factor"):
            mark = " (best)" if factor == best[cell] else ""
            by_factor.append(
                [cell[0], f"{cell[1]:g}", f"{factor:g}{mark}", len(group), range_of(group["best_accuracy"])]
            )
    rows, differences = [], []
    for cell in cell_order(data):
        edge = " (edge of the grid)" if best[cell] in (data["factor"].min(), data["factor"].max()) else ""
        row = [cell[0], f"{cell[1]:g}", f"{best[cell]:g}{edge}"]
        for tuned in (True, False):
            other = ("random", cell[1])
            if other not in best or cell[0] in ("random", "full"):
                row += ["", ""]
                continue
            values = []
            for one in (cell, other):
                factor = best[one] if tuned else 1.0
                own = data[(data["strategy"] == one[0]) & (data["keep"] == one[1]) & (data["factor"] == factor)]
                values.append(own.set_index("seed")["best_accuracy"])
            difference = compare_paired((values[0] - values[1]).dropna().tolist())
            differences.append(difference)
            row += [str(difference), difference.verdict if difference.pairs else ""]
        rows.append(row)
    head = [
        "strategy",
        "keep",
        "best β",
        "minus random, each at its best β",
        "verdict",
        "minus random at β = 1",
        "verdict",
    ]
    lines += ["## Against random", "", *markdown(head, rows)]
    lines += what_seeds_can_tell(int(data["seed"].nunique()), differences)
    head = ["strategy", "keep", "β", "runs", "best accuracy: mean (min to max)"]
    lines += ["## Accuracy", "", *markdown(head, by_factor)]
    draw_learning_rates(data, store.folder / "learning_rate", f"{name}, label noise {noise:.0%}")
    return lines
