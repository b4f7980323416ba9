"""The run of the step-time study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer_gradmatch.studies.configs import quiet, with_synthetic_data
from composer_gradmatch.studies.planning import cells
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import strategy_named
from composer_gradmatch.studies.study import Plan

__all__ = ["plan_step_time", "step_time_run"]


def plan_step_time(
    config: dict[str, Any], strategies: Sequence[str], keeps: Sequence[float], *, rounds: int, synthetic: bool
) -> Plan:
    """Plans a run that times strategies side by side (Table 1), and one for those with stored looks, if any."""
    config = with_synthetic_data(config) if synthetic else config
    size = config["global_train_batch_size"]
    variants = [(strategy, keep, size) for strategy, keep in cells(strategies, keeps)]
    own = quiet({**config, "seed": 0, "eval_loader": None}, "step-time")
    runs = [step_time_run(own, variants, rounds, synthetic=synthetic)]
    stored = sorted(each for each in variants if strategy_named(each[0]).is_stored)
    if stored:
        settings = {"variants": _named(stored), "synthetic": synthetic}
        options = {"variants": [["full", 1.0, size], *map(list, stored)], "stored": True}
        runs.append(Run("step-time", settings, own, options))
    return Plan(runs, {"synthetic": synthetic})


def step_time_run(
    config: dict[str, Any], variants: Sequence[tuple[str, float, int]], rounds: int, **settings: Any
) -> Run:
    """Gives the run that times variants (strategy, keep, batch size) of a config beside the full batch."""
    full = ("full", 1.0, config["global_train_batch_size"])
    variants = sorted({full, *(each for each in variants if not strategy_named(each[0]).is_stored)})
    settings = {"variants": _named(variants), "rounds": rounds, **settings}
    return Run("step-time", settings, config, {"variants": [list(v) for v in variants], "rounds": rounds})


def _named(variants: Sequence[tuple[str, float, int]]) -> str:
    return " ".join(f"{strategy}:{keep:g}:{size}" for strategy, keep, size in variants)
