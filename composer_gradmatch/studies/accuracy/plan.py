"""The runs of the accuracy study: trainings, and one that times their steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from composer.core import Time

from composer_gradmatch.studies.configs import accuracy_metric, quiet
from composer_gradmatch.studies.planning import cells, training_run
from composer_gradmatch.studies.step_time.plan import step_time_run
from composer_gradmatch.studies.strategies import with_strategy
from composer_gradmatch.studies.study import Plan
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
) -> Plan:
    """Plans the training runs, seed by seed, and alone before them the one that times the strategies' steps."""
    shared = {"label_noise": label_noise, "metric": accuracy_metric(config, metric), "batch_size": batch_size}
    runs = []
    pairs = cells(strategies, keeps)
    for seed, (strategy, keep) in product(range(seeds), pairs):
        settings = {"strategy": strategy, "keep": keep, "seed": seed}
        settings |= {"label_noise": label_noise, "batch_size": batch_size}
        own = _scaled(with_strategy({**config, "seed": seed}, strategy, keep), keep, batch_size)
        runs.append(training_run("accuracy", settings, own, shared["metric"]))
    base = config["global_train_batch_size"]
    sizes = [(s, k, scaled_batch_size(base, k) if batch_size == "scaled" and k < 1 else base) for s, k in pairs]
    timing = step_time_run(quiet({**config, "seed": 0}, "step-time"), sizes, rounds)
    return Plan(runs, shared, alone=[timing])


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
