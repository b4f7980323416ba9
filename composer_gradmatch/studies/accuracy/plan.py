"""The runs of the accuracy study: trainings, and one that times their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from composer.core import Time

from composer_gradmatch.studies.configs import accuracy_metric, quiet
from composer_gradmatch.studies.engines.engine import Engine
from composer_gradmatch.studies.planning import cells, training_run
from composer_gradmatch.studies.step_time.plan import step_time_run
from composer_gradmatch.studies.store import Run, Store
from composer_gradmatch.studies.strategies import with_strategy
from composer_gradmatch.studies.study import Plan
from composer_gradmatch.studies.verdict.trial import Cell
from composer_gradmatch.studies.verdict.tuning import Tuning, tuning_rate
from composer_gradmatch.train.config import ConfigError

__all__ = ["plan_accuracy", "scaled_batch_size"]


def plan_accuracy(
    config: dict[str, Any],
    strategies: Sequence[str],
    keeps: Sequence[float],
    *,
    seeds: int,
    metric: str | None = None,
    label_noise: float = 0.0,
    batch_size: str = "fixed",
    rounds: int = 10,
    tune: bool = False,
    validation: float = 0.1,
) -> Plan:
    """Plans the training runs, seed by seed, and alone before them the one that times the strategies' steps.

    With ``tune``, learning rates are chosen on a part ``validation`` of the training set before that.
    """
    shared = {"label_noise": label_noise, "metric": accuracy_metric(config, metric), "batch_size": batch_size}
    pairs = cells(strategies, keeps)

    def planned(rates: Mapping[Cell, float] | None = None) -> list[Run]:
        runs = []
        for seed, (strategy, keep) in product(range(seeds), pairs):
            settings: dict[str, Any] = {"strategy": strategy, "keep": keep, "seed": seed}
            settings |= {"label_noise": label_noise, "batch_size": batch_size}
            own = _scaled(with_strategy({**config, "seed": seed}, strategy, keep), keep, batch_size)
            if rates is not None:
                settings["rate"] = rates[strategy, keep]
                own["optimizer"] = {**own["optimizer"], "lr": rates[strategy, keep]}
            runs.append(training_run("accuracy", settings, own, shared["metric"]))
        return runs

    def tuned(store: Store, engine: Engine, retry_failed: bool) -> list[Run]:
        change = partial(_scaled, batch_size=batch_size)
        tuning = Tuning(config, pairs, shared["metric"], label_noise, validation, change)
        return planned(tuning.rates(store, engine, retry_failed))

    if tune:
        tuning_rate(config)
        shared["tuned on"] = validation
    base = config["global_train_batch_size"]
    sizes = [(s, k, scaled_batch_size(base, k) if batch_size == "scaled" and k < 1 else base) for s, k in pairs]
    timing = step_time_run(quiet({**config, "seed": 0}, "step-time"), sizes, rounds)
    return Plan(planned(), shared, alone=[timing], adapt=tuned if tune else None)


def _scaled(config: dict[str, Any], keep: float, batch_size: str) -> dict[str, Any]:
    """Sets M = M_base/keep for ``scaled`` (App. C.2), so that m is M_base whatever is kept."""
    if batch_size == "fixed" or keep == 1:
        return config
    if Time.from_input(config["max_duration"]).unit.value not in ("ep", "sp"):
        raise ConfigError(
            f"--batch-size scaled: max_duration={config['max_duration']!r} counts steps, but all runs are to forward "
            "the same number of samples. Give it in epochs (ep) or samples (sp)."
        )
    base = config["global_train_batch_size"]
    return {
        "device_train_microbatch_size": base,
        **config,
        "global_train_batch_size": scaled_batch_size(base, keep),
    }


def scaled_batch_size(base: int, keep: float) -> int:
    """The smallest M of which a fraction is ``base`` samples, by the rule of the algorithms: m = max(1, int(keep·M)).

    Args:
        base (int): m, at least 1.
        keep (float): In (0, 1].
    """
    size = max(1, int(base / keep) - 1)
    while int(keep * size) < base:
        size += 1
    # The quotient may be rounded up by more than one where it is too large for a float to hold exactly.
    while size > 1 and int(keep * (size - 1)) >= base:
        size -= 1
    return size
