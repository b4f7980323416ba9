"""The runs of the learning-rate study."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from composer.core import Time

from composer_gradmatch.studies.configs import accuracy_metric, learning_rate
from composer_gradmatch.studies.planning import cells, training_run
from composer_gradmatch.studies.strategies import with_strategy
from composer_gradmatch.studies.study import Plan
from composer_gradmatch.train.config import ConfigError

__all__ = ["plan_learning_rate"]


def plan_learning_rate(
    config: dict[str, Any],
    strategies: Sequence[str],
    keeps: Sequence[float],
    *,
    seeds: int,
    factors: Sequence[float],
    metric: str | None = None,
    label_noise: float = 0.0,
) -> Plan:
    """Plans training with the learning rate times β and the schedule stretched to T/β, for each β (App. C.4)."""
    shared = {"label_noise": label_noise, "metric": accuracy_metric(config, metric)}
    runs = []
    rate, ratio = learning_rate(config), config.get("scale_schedule_ratio", 1.0)
    duration = Time.from_input(config["max_duration"]).value
    for factor in factors:
        if int(duration * ratio / factor) < 1:
            raise ConfigError(
                f"--factors: β={factor:g} shortens max_duration={config['max_duration']} to nothing. Leave it out, or "
                "train longer."
            )
    for seed, factor, (strategy, keep) in product(range(seeds), factors, cells(strategies, keeps)):
        settings = {"strategy": strategy, "keep": keep, "factor": factor, "seed": seed, "label_noise": label_noise}
        own = with_strategy({**config, "seed": seed, "scale_schedule_ratio": ratio / factor}, strategy, keep)
        own["optimizer"] = {**own["optimizer"], "lr": rate * factor}
        runs.append(training_run("learning-rate", settings, own, shared["metric"]))
    return Plan(runs, shared)
