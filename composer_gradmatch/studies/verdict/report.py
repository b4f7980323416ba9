"""The verdict in words, tables and figures, from ``verdict.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from composer_gradmatch.studies.statistics import Difference
from composer_gradmatch.studies.store import Store
from composer_gradmatch.studies.tables import conditions, markdown
from composer_gradmatch.studies.time_to_accuracy import Reached
from composer_gradmatch.studies.verdict.figures import draw_curves, draw_frontier
from composer_gradmatch.studies.verdict.headroom import CHEAP
from composer_gradmatch.studies.verdict.progress import in_words

__all__ = ["gaps_of_random", "report_verdict"]

#: From what ratio of costs on a line between two points of random's curve is called long.
_FAR = 2.0


def report_verdict(store: Store, name: str) -> list[str]:
    """Draws the figures and returns the summary's lines."""
    path = store.folder / "verdict.json"
    lines = [f"# Verdict on {name}", ""]
    if not path.exists():
        return [*lines, "There is none yet.", "", *conditions(store, "verdict")]
    found = json.loads(path.read_text())
    best = found["recommended"]
    lines += [f"> {best['sentence']}", "", *_against_random(found), ""]
    lines += ["To train so, write in the config:", "", "```yaml", *best["yaml"].splitlines(), "```", ""]
    draw_frontier(found, store.folder / "verdict", f"{name}: accuracy over cost")
    draw_curves(found, store.folder / "time_to_accuracy", f"{name}: accuracy within a run")
    lines += ["## Candidates", "", "![Accuracy over cost](verdict.png)", "", *_candidates(found)]
    lines += ["## Time to accuracy", "", "![Accuracy within a run](time_to_accuracy.png)", "", *_times(found)]
    lines += ["## Headroom", "", *_headroom(found)]
    lines += ["## Learning rates", "", *_rates(found)]
    lines += ["## Conditions", "", *_spent(found, store), "", *conditions(store, "verdict")]
    return lines


def _named(each: dict[str, Any]) -> str:
    return f"{each['strategy']} at keep {each['keep']:g}"


def _against_random(found: dict[str, Any]) -> list[str]:
    """Says what choosing is worth, beside what random parts are at the same cost."""
    chosen = [each for each in found["candidates"] if each["strategy"] != "random" and not each["error"]]
    words = {
        kind: [_named(each) for each in chosen if each["against_random"] == kind]
        for kind in ("better", "worse", "no different", "undecided")
    }
    if not any(words.values()) or found["headroom"]["answers"]:
        return []
    said = [f"{kind}: {', '.join(names)}" for kind, names in words.items() if names]
    rates = "" if found["tuning"] is None else ", each with its own learning rate"
    return [f"Against random at equal cost{rates}: {'; '.join(said)}."]


def _interval(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    return str(Difference(**difference))


def _share(cost: dict[str, float] | None) -> str:
    return "" if cost is None else f"{cost['mean']:.2f} ({cost['low']:.2f} to {cost['high']:.2f})"


def _candidates(found: dict[str, Any]) -> list[str]:
    rows = []
    for each in found["candidates"]:
        further = each["further_seeds"]
        undecided = each["against_full"] == "undecided"
        more = (str(further) if further else "?") if undecided and each["seeds"] else ""
        accuracy = "" if each["accuracy"] is None else f"{each['accuracy']:.4f}"
        rows.append(
            [
                each["strategy"],
                f"{each['keep']:g}",
                f"{each['rate']:g}",
                each["seeds"] or "",
                accuracy,
                _share(each["cost"]),
                _interval(each["minus_full"]),
                each["against_full"],
                _interval(each["minus_random"]),
                each["against_random"],
                more,
            ]
        )
    full = found["full"]
    rows.append(["full", "1", f"{full['rate']:g}", full["seeds"], f"{full['accuracy']:.4f}", "1", *[""] * 5])
    head = ["strategy", "keep", "lr", "seeds", "test accuracy", "cost", "minus full batch", "so it is"]
    head += ["minus random at equal cost", "so it is", "further seeds"]
    lines = markdown(head, rows)
    lines += [
        f"*Cost* is the time of training (data, selection and steps, not evaluation) as a share of the full batch's of "
        f"the same seed, with its 95 % interval. *Non-inferior* is within the margin of {found['margin']:g}, *worse* "
        f"beyond it. Intervals are paired by seed and hold together at {found['confidence']:.0%}: over all looks and "
        f"all {found['comparisons']} comparisons. They are about seeds, on this one test set of "
        f"{found['test_samples']:,} samples. *Further seeds* are those that would decide it against the full batch, "
        "if mean and spread stay what they are. *At equal cost* random's curve, up to the full batch, is read at the "
        "candidate's cost.",
        "",
    ]
    notes = [f"- {_named(each)} failed: {each['error']}" for each in found["candidates"] if each["error"]]
    notes += gaps_of_random(found["candidates"])
    return [*lines, *notes, *([""] if notes else [])]


def gaps_of_random(candidates: Sequence[dict[str, Any]]) -> list[str]:
    """Says where random's curve, at the cost of a candidate, is a line between points that are far apart.

    Args:
        candidates (Sequence[dict[str, Any]]): As in ``verdict.json``.
    """
    points = [
        (each["cost"]["mean"], _named(each)) for each in candidates if each["strategy"] == "random" and each["cost"]
    ]
    points = sorted([*points, (1.0, "the full batch")])
    notes = []
    for each in candidates:
        if each["minus_random"] is None or each["cost"] is None:
            continue
        cost = each["cost"]["mean"]
        below, above = ([p for p in points if p[0] <= cost], [p for p in points if p[0] > cost])
        if below and above and above[0][0] > _FAR * below[-1][0]:
            notes.append(
                f"- At the cost of {_named(each)}, {cost:.2f}, random was not measured: its curve is a line from "
                f"{below[-1][1]} (cost {below[-1][0]:.2f}) to {above[0][1]} (cost {above[0][0]:.2f}), and may lie "
                f"below what random reaches there. Add --keep {cost:.1g} to know."
            )
    return notes


def _times(found: dict[str, Any]) -> list[str]:
    rows = []
    for each in [{"strategy": "full", "keep": 1.0, **found["full"]}, *found["candidates"]]:
        if each["time_to_accuracy"] is not None:
            reached = Reached(**each["time_to_accuracy"])
            rows.append([each["strategy"], f"{each['keep']:g}", f"{reached.reached} of {reached.runs}", str(reached)])
    return [
        "The cost, in whole runs of the full batch, at the first evaluation that reaches "
        f"{found['target_accuracy']:.4f}, the full batch's accuracy at the end minus the margin: median over seeds "
        "(earliest to latest).",
        "",
        *markdown(["strategy", "keep", "runs that reach it", "cost"], rows),
    ]


def _headroom(found: dict[str, Any]) -> list[str]:
    headroom = found["headroom"]
    if headroom["answers"]:
        shown = "Random is within the margin at a third of the cost or less: that was the answer."
    elif headroom["random"]:
        shown = f"Random was not shown to be within the margin at {CHEAP:.0%} of the cost or less."
    else:
        shown = "Random was not looked at beforehand: that would take more than a quarter of the budget."
    lines = [
        f"The full batch's accuracy at the config's learning rate is {headroom['full_accuracy']:.4f}; the test set "
        f"resolves {headroom['resolution']:.4f}. {shown}",
        "",
    ]
    if headroom["random"]:
        rows = [
            [f"{each['keep']:g}", each["seeds"], _share(each["cost"]), _interval(each["minus_full"])]
            for each in headroom["random"]
        ]
        lines += markdown(["random, keep", "seeds", "cost", "minus full batch"], rows)
    if headroom["noise_scale"]:
        scales = [
            "none" if row["noise_scale"] is None else f"{row['noise_scale']:.0f}" for row in headroom["noise_scale"]
        ]
        lines += [
            f"The gradient noise scale tr Σ/‖G‖² of the output layer is {', '.join(scales)} samples in the four "
            f"quarters of a run of the full batch, beside a batch of {headroom['batch_size']}: the smaller, the less "
            "is lost by training on a part.",
            "",
        ]
    elif not headroom["noise_scale_error"]:
        lines += ["The gradient noise scale was not measured: that would take more than a tenth of the budget.", ""]
    else:
        lines += [f"The gradient noise scale could not be measured: {headroom['noise_scale_error']}", ""]
    if headroom["step_times"]:
        rows = [
            [each["strategy"], f"{each['keep']:g}", f"{each['seconds'] * 1000:.1f}"] for each in headroom["step_times"]
        ]
        lines += ["Steps of all of them, in turn on the same model:", ""]
        lines += markdown(["strategy", "keep", "ms per step"], rows)
    elif headroom["step_times_error"]:
        lines += [f"Steps could not be timed beforehand: {headroom['step_times_error']}", ""]
    return lines


def _rates(found: dict[str, Any]) -> list[str]:
    if found["tuning"] is None:
        why = "the headroom gave the answer" if found["headroom"]["answers"] else "no choice of them fitted the budget"
        return [f"All runs are at the config's learning rate: {why}.", ""]
    tuning = found["tuning"]
    rungs = ", then ".join(f"{seeds} seed(s) of {share:.0%} of the duration" for share, seeds in tuning["rungs"])
    lines = [
        f"Chosen on the validation part, for each strategy and keep from {len(tuning['factors'])} rates at "
        f"{', '.join(f'{factor:g}' for factor in tuning['factors'])} times the config's, {tuning['name']}: {rungs}; "
        "half of them go on each time.",
        "",
    ]
    rows = []
    for each in [{"strategy": "full", "keep": 1.0, **found["full"]}, *found["candidates"]]:
        if tuned := each["tuning"]:
            edge = "at the edge of the grid" if tuned["at_edge"] else ""
            accuracy = tuned["error"] or f"{tuned['accuracy']:.4f}"
            effort = [tuned["runs"], in_words(tuned["seconds"])]
            rows.append([each["strategy"], f"{each['keep']:g}", f"{tuned['rate']:g}", accuracy, *effort, edge])
    return [*lines, *markdown(["strategy", "keep", "lr", "validation accuracy", "runs", "time", ""], rows)]


def _spent(found: dict[str, Any], store: Store) -> list[str]:
    nodes = {node for record in store.records("verdict") if (node := record.provenance.get("node"))}
    where = f"on {len(nodes)} node(s) of a Ray cluster, times added up" if nodes else "one at a time"
    return [
        f"{in_words(found['spent_s'])} of a budget of {in_words(found['budget_s'])} spent on {found['runs']} runs and "
        f"on timing, {where}; seeds from {found['seed']}."
    ]
