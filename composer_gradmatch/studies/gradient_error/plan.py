"""The runs of the gradient-error study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer_gradmatch.studies.configs import quiet, with_label_noise
from composer_gradmatch.studies.planning import cells
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.study import Plan
from composer_gradmatch.train.config import ConfigError

__all__ = ["plan_gradient_error"]


def plan_gradient_error(
    config: dict[str, Any],
    strategies: Sequence[str],
    keeps: Sequence[float],
    *,
    seeds: int,
    minibatches: int,
    mode: str,
    checkpoint: str,
    label_noise: float = 0.0,
) -> Plan:
    """Plans a run for each seed, in which all strategies see the same minibatches (§5.3)."""
    if checkpoint and "://" not in checkpoint and not Path(checkpoint).is_file():
        raise ConfigError(f"--checkpoint: there is no file {checkpoint}. Give a checkpoint that Composer has saved.")
    pairs = [("full", 1.0), *(pair for pair in cells(strategies, keeps) if pair[0] != "full")]
    named = " ".join(f"{strategy}:{keep:g}" for strategy, keep in pairs)
    own = {"minibatches": minibatches, "mode": mode, "checkpoint": checkpoint}
    runs = [
        Run(
            "gradient-error",
            {"seed": seed, "label_noise": label_noise, "variants": named, **own},
            quiet(with_label_noise({**config, "seed": seed, "eval_loader": None}, label_noise, seed), f"errors-{seed}"),
            {"variants": [list(pair) for pair in pairs], "minibatches": minibatches},
        )
        for seed in range(seeds)
    ]
    return Plan(runs, {**own, "label_noise": label_noise})
