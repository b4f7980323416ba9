"""What stored looks are worth: their picks beside those of a look at the whole minibatch at the same time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from composer.core import State

from composer_gradmatch.benchmarks.watching import fit_watched
from composer_gradmatch.candidates.source import Source
from composer_gradmatch.candidates.stored import StoredLooks
from composer_gradmatch.forward.ranks import unwrap
from composer_gradmatch.forward.sample_checks import normalised_by_running_statistics
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.gradient_matching import gradient_matching
from composer_gradmatch.rules.picks import WholeBatch
from composer_gradmatch.rules.step_quality import gradient_noise, step_error

__all__ = ["FILLS", "averages", "compare_picks", "measure_looks"]

#: How looks at few rows are made in models with batch normalisation: filled up to so many rows with the oldest, or as
#: they are, with running statistics in the place of the rows' own.
FILLS = ("2", "8", "32", "128", "running")
_NEVER = "1000000ep"


def compare_picks(approximate: Candidates, exact: Candidates, m: int) -> dict[str, float] | None:
    """Compares picks by approximate candidates with picks by exact ones, both by the solver's own weights.

    Args:
        approximate (Candidates): Of M samples, with gradients.
        exact (Candidates): Of the same samples.
        m (int): The number of picks.

    Returns:
        dict[str, float], optional: ``overlap``, the share of the exact picks that are the others', too;
        ``r``, the squared error of the step on the approximate picks, by the exact K, relative to that of as many
        random ones; ``r of a full look``, the same of the exact picks; and ``error in K``, ‖K̂ − K‖/‖K‖ (Frobenius).
        None where one of them picks nothing.
    """
    ours, theirs = (gradient_matching(each, m, weights="matched") for each in (approximate, exact))
    if isinstance(ours, WholeBatch) or isinstance(theirs, WholeBatch):
        return None
    gram = exact.gram
    _, trace = gradient_noise(gram)
    of_random = float(trace) * (1 / m - 1 / len(gram))
    weights = [None if each.weights is None else each.weights.to(gram) for each in (ours, theirs)]
    errors = [float(step_error(gram, each.indices, w)[1]) for each, w in zip((ours, theirs), weights, strict=True)]
    same = torch.isin(theirs.indices, ours.indices)
    return {
        "overlap": float(same.double().mean()),
        "r": errors[0] / of_random,
        "r of a full look": errors[1] / of_random,
        "error in K": float((approximate.gram - gram).norm() / gram.norm()),
    }


def averages(compared: Sequence[dict[str, float]]) -> dict[str, float]:
    """Averages comparisons: means, and of the error in K the median, since K of late minibatches is nearly nothing."""
    columns = {name: [each[name] for each in compared] for name in (compared[0] if compared else ())}
    return {
        name: statistics.median(values) if name == "error in K" else statistics.mean(values)
        for name, values in columns.items()
    }


def measure_looks(
    config: dict[str, Any], refreshes: Sequence[str], fills: Sequence[str], keep: float = 0.1, every: int = 5
) -> list[dict[str, Any]]:
    """Trains once for each refresh and each way of looking at few rows, and compares picks in some steps.

    Args:
        config (dict[str, Any]): As :func:`.load_config` returns it.
        refreshes (Sequence[str]): Times such as ``"5ep"``, or ``"never"`` for one look at each sample.
        fills (Sequence[str]): Of :data:`FILLS`; they differ in models with batch normalisation only.
        keep (float, optional): m/M. Default: ``0.1``.
        every (int, optional): Steps from one comparison to the next. Default: ``5``.

    Returns:
        list[dict[str, Any]]: A row for each, with :func:`averages` of the comparisons from the second epoch on, and the
        share of the rows that were looked at in the same time.
    """
    rows = []
    for refresh in refreshes:
        for fill in fills:
            found, looked_at = [], []

            def prepare(source: Source, fill: str = fill) -> None:
                assert isinstance(source, StoredLooks)
                _set_fill(source, fill)

            def watch(
                state: State,
                source: Source,
                candidates: Candidates,
                found: list[dict[str, float]] = found,
                looked_at: list[float] = looked_at,
            ) -> None:
                assert isinstance(source, StoredLooks)
                looked_at.append(source.metrics["fraction_looked_at"])
                # Not by the source's own, which would make what it sees the store's.
                fresh = type(source.two_passes).look(source.two_passes, state, candidates.num_samples)
                m = max(1, int(keep * candidates.num_samples))
                if (compared := compare_picks(candidates, fresh, m)) is not None:
                    found.append(compared)

            time = _NEVER if refresh == "never" else refresh
            fit_watched(config, watch, every, prepare, keep=keep, refresh=time)
            means = averages(found)
            share = statistics.mean(looked_at) if looked_at else float("nan")
            rows.append({"refresh": refresh, "fill": fill, "looked at": share, **means, "minibatches": len(found)})
    return rows


def _set_fill(source: StoredLooks, fill: str) -> None:
    if fill != "running":
        source.rows_for_batch_norm = int(fill)
        return
    source.rows_for_batch_norm = 1
    look = source.two_passes.look

    def by_running_statistics(state: State, num_samples: int) -> Candidates:
        few = num_samples < len(source.numbers)
        with normalised_by_running_statistics(unwrap(state.model)) if few else nullcontext():
            return look(state, num_samples)

    vars(source.two_passes).update(look=by_running_statistics)
