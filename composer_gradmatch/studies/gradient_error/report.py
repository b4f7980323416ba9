"""The gradient-error study's report."""

from __future__ import annotations

import pandas as pd

from composer_gradmatch.studies.gradient_error.figure import draw_gradient_errors
from composer_gradmatch.studies.gradient_error.parts_figure import draw_error_parts
from composer_gradmatch.studies.gradient_error.parts_report import moment, report_parts
from composer_gradmatch.studies.statistics import compare_paired, what_seeds_can_tell
from composer_gradmatch.studies.store import Store
from composer_gradmatch.studies.tables import Table, cell_order, conditions, frame, markdown

__all__ = ["report_gradient_error"]


def report_gradient_error(store: Store, name: str) -> list[str]:
    """Draws the figures and returns the summary's lines."""
    data = frame(store.records("gradient-error"))
    lines = [f"# Gradient-error study of {name}", "", *conditions(store, "gradient-error"), ""]
    if data.empty:
        return [*lines, "No run succeeded: there is nothing to compare."]
    of_steps, of_parts = (data[data["against"] == kind] for kind in ("data", "minibatch"))
    for after, steps in of_steps.groupby("after"):
        lines += _report_steps(steps, int(after), store, name)
    if len(of_parts):
        lines += report_parts(of_parts)
        draw_error_parts(of_parts, store.folder / "error_parts", name)
    missing = sorted({*of_steps["strategy"]} - {*of_parts["strategy"], "full"})
    if missing and len(of_parts):
        lines += [f"Of {', '.join(missing)} only training steps were compared: see --against.", ""]
    return lines


def _report_steps(data: Table, after: int, store: Store, name: str) -> list[str]:
    """Draws Figure 3 and tells of the distance to the full data's gradient, after some epochs."""
    first = data.iloc[0]
    weights = f"the checkpoint {first['checkpoint']}" if first["checkpoint"] else "random initialisation"
    if after:
        weights = f"the weights {moment(after)} of the full batch from {weights}"
    mode = "training" if first["mode"] == "train" else "evaluation"
    where = f"at {weights}, model in {mode} mode, {data['seed'].nunique()} seeds of {first['minibatches']} minibatches"
    lines = [
        f"Squared L2 distance of the gradient a strategy trains with (weights applied) to the full data's, {where}. "
        "*Relative* errors are divided by the full-data gradient's squared norm. All strategies see the same "
        "minibatches; *full* is the whole minibatch. In training mode BatchNorm normalises by the samples at hand, so "
        "even a whole minibatch's gradient is not an unbiased one of the full data.",
        "",
    ]
    index = ["seed", "minibatch"]
    rows, proxies, differences = [], [], []
    for strategy, keep in cell_order(data):
        own = data[(data["strategy"] == strategy) & (data["keep"] == keep)].set_index(index)
        random = data[(data["strategy"] == "random") & (data["keep"] == keep)].set_index(index)
        row = [strategy, f"{keep:g}"]
        row += [f"{own['squared_error'].mean():.4g}", f"{own['squared_error'].median():.4g}"]
        row += [f"{own['relative_error'].mean():.3f}", f"{own['cosine'].mean():.3f}"]
        if strategy in ("random", "full") or random.empty:
            row += ["", "", ""]
        else:
            gap = (random["relative_error"] - own["relative_error"]).dropna()
            difference = compare_paired(gap.groupby("seed").mean().tolist())
            differences.append(difference)
            ratio = own["squared_error"].mean() / random["squared_error"].mean()
            verdict = difference.verdict if difference.low == difference.low else "not distinguishable (no interval)"
            row += [f"{ratio:.2f}", f"{(gap > 0).mean():.0%}", verdict]
        rows.append(row)
        last, whole = own["last_layer_squared_error"], own["squared_error"]
        rank = last.rank().corr(whole.rank()) if last.notna().all() else float("nan")
        proxies.append(
            [
                strategy,
                f"{keep:g}",
                f"{own['last_layer_relative_error'].mean():.3f}",
                f"{own['last_layer_cosine'].mean():.3f}",
                f"{own['last_layer_minibatch_relative_error'].mean():.3f}",
                f"{own['minibatch_relative_error'].mean():.3f}",
                "" if pd.isna(rank) else f"{rank:.2f}",
            ]
        )
    head = ["strategy", "keep", "mean squared error", "median", "mean relative error", "mean cosine"]
    head += ["error / random's", "minibatches below random", "verdict against random"]
    when = f", {moment(after)}" if after else ""
    lines += [f"## Error of the whole gradient{when}", "", *markdown(head, rows)]
    seeds = int(data["seed"].nunique())
    lines += what_seeds_can_tell(seeds, differences, "mean relative error")
    lines += [
        "The verdict is about the mean relative error of each seed (lower is better), paired by seed.",
        "",
        f"## How good the last layer is as a proxy{when}",
        "",
        "Errors of the last layer's part of the gradient, to the full data's and to the minibatch's own (which is what "
        "selection matches), beside the whole gradient's to the minibatch's own; and the rank correlation over "
        "minibatches of the last layer's error with the whole gradient's.",
        "",
    ]
    head = ["strategy", "keep", "last layer: relative error", "last layer: cosine", "last layer: to the minibatch's"]
    lines += markdown([*head, "all parameters: to the minibatch's", "rank correlation"], proxies)
    figure = f"gradient_error_after_{after}ep" if after else "gradient_error"
    draw_gradient_errors(data, store.folder / figure, f"{name}, {where}")
    return lines
