"""The step-time study's report."""

from __future__ import annotations

import pandas as pd

from composer_gradmatch.studies.statistics import interval_of_median, ratio_of_means
from composer_gradmatch.studies.step_time.figure import draw_step_times
from composer_gradmatch.studies.step_time.timer import PARTS
from composer_gradmatch.studies.store import Store
from composer_gradmatch.studies.strategies import Strategy, strategy_named
from composer_gradmatch.studies.tables import Table, cell_order, conditions, frame, markdown

__all__ = ["cost_of_shares", "report_step_time"]


def cost_of_shares(strategy: Strategy, keep: float, forward: float, backward: float, rest: float) -> float:
    """Tells what a step would cost, in full steps, if its passes cost what they do in the full batch's step.

    The passes cost by the sample, as :meth:`.Strategy.cost` has it, the rest by the step.

    Args:
        strategy (Strategy): What is trained with.
        keep (float): m/M; not used for the full batch.
        forward (float): f, the share of the full batch's step in its forward pass.
        backward (float): b, the same of its backward pass.
        rest (float): r, the same of all else. For a step on n times the full batch's samples, whose cost is to be by
            the sample, pass r/n.
    """
    passes = forward + backward
    return passes * strategy.cost(keep, forward / passes) + rest


def report_step_time(store: Store, name: str) -> list[str]:
    """Draws Table 1 and returns the summary's lines."""
    data = frame(store.records("step-time"))
    lines = [f"# Step-time study of {name}", "", *conditions(store, "step-time"), ""]
    if data.empty:
        return [*lines, "The run failed: there is nothing to compare."]
    steps, timed = data[data["measured"] == "step"], data[data["measured"] == "parts"]
    stored = data[(data["measured"] == "period") & (data["strategy"] != "full")]
    size = int(steps.loc[steps["strategy"] == "full", "batch_size"].iloc[0])
    rounds = steps.groupby(["strategy", "keep"]).size().min()
    full_seconds = timed.loc[timed["strategy"] == "full", "seconds"].median()
    forward, backward, rest = _own_shares(timed[timed["strategy"] == "full"])
    synthetic = ", random tensors in the place of data" if data["synthetic"].any() else ""
    title = f"{name}, M = {size}, medians of {rounds} interleaved steps{synthetic}"
    lines += [
        f"M = {size}{synthetic}; medians of {rounds} steps of each strategy, interleaved in random order; "
        "ratios to the full batch's step of the same round, with the 95 % interval of the median. Data loading is not "
        "in it. The cost models are m/M for random and (M/3 + m)/M for two passes, "
        "(M/3 + 2m/3)/M where the activations of the first are reused. *Own shares* is the same with the shares of "
        f"the full batch's own step, {forward:.2f} forward, {backward:.2f} backward and {rest:.2f} for the rest, in "
        "the place of 1/3, 2/3 and 0; the rest costs the same in every step.",
        "",
    ]
    rows, table, shares, parts = [], [], [], []
    for strategy, keep in cell_order(steps):
        own = steps[(steps["strategy"] == strategy) & (steps["keep"] == keep)]
        low, high = interval_of_median(own["ratio"])
        ratio, model = float(own["ratio"].median()), strategy_named(strategy).cost(keep)
        # Ratios are by the sample of the minibatch, and a larger one has the rest only once.
        own_rest = rest * size / int(own["batch_size"].iloc[0])
        shared = cost_of_shares(strategy_named(strategy), keep, forward, backward, own_rest)
        table.append({"strategy": strategy, "keep": keep, "ratio": ratio, "low": low, "high": high})
        milliseconds, interval = f"{own['seconds'].median() * 1000:.1f}", f"{low:.2f} to {high:.2f}"
        rows.append([strategy, f"{keep:g}", milliseconds, f"{ratio:.2f}", interval, f"{model:.2f}", f"{shared:.2f}"])
        split = timed[(timed["strategy"] == strategy) & (timed["keep"] == keep)]
        seconds = {part: split[f"{part}_seconds"].median() for part in PARTS}
        total = sum(seconds.values())
        parts.append({"strategy": strategy, "keep": keep, **{part: s / full_seconds for part, s in seconds.items()}})
        shares.append([strategy, f"{keep:g}", *(f"{s / total:.1%}" if s else "" for s in seconds.values())])
    for strategy, keep in cell_order(stored):
        own = stored[(stored["strategy"] == strategy) & (stored["keep"] == keep)]
        full = data[(data["measured"] == "period") & (data["strategy"] == "full")]
        of_round = own.set_index("round")["seconds"].to_frame("own").join(full.set_index("round")["seconds"])
        ratio, low, high = ratio_of_means(of_round["own"], of_round["seconds"])
        model = strategy_named(strategy).cost(keep)
        shared = cost_of_shares(strategy_named(strategy), keep, forward, backward, rest)
        table.append({"strategy": strategy, "keep": keep, "ratio": ratio, "low": low, "high": high})
        milliseconds, interval = f"{own['seconds'].mean() * 1000:.1f}", f"{low:.2f} to {high:.2f}"
        rows.append([strategy, f"{keep:g}", milliseconds, f"{ratio:.2f}", interval, f"{model:.2f}", f"{shared:.2f}"])
    if not stored.empty:
        lines += [
            "Steps of strategies with stored looks are not alike. Theirs are means over all steps from one look at a "
            f"sample to the next, {stored['round'].max() + 1} of each, after an epoch in which all were looked at; the "
            "full batch made a step on each of the same minibatches. Their cost model is "
            "(1/R)/3 + m/M with R the epochs between looks, and their interval is by resampling steps.",
            "",
        ]
    lines += ["## Time per step", ""]
    lines += markdown(["strategy", "keep", "ms", "ratio to full", "95 % interval", "cost model", "own shares"], rows)
    lines += ["## Where a strategy's own step goes", ""]
    lines += markdown(["strategy", "keep", *(part.replace("_", " ") for part in PARTS)], shares)
    lines += [
        "*Selection forward* to *indexing* are the parts of our own algorithms: H by a forward pass, P, K, matching "
        "pursuit, and taking the picked samples; *selection rest* is what else happens before the step (all of it, for "
        "Composer's `SelectiveBackprop`), *rest* the optimizer, metrics and Composer's own work.",
        "",
    ]
    draw_step_times(pd.DataFrame(table), pd.DataFrame(parts), store.folder / "step_time", title)
    return lines


def _own_shares(full: Table) -> tuple[float, float, float]:
    """Gives the shares of the full batch's step in its forward pass, its backward pass and all else."""
    medians = [float(full[f"{part}_seconds"].median()) for part in ("training_forward", "training_backward")]
    medians.append(float((full["selection_rest_seconds"] + full["rest_seconds"]).median()))
    forward, backward, rest = (seconds / sum(medians) for seconds in medians)
    return forward, backward, rest
