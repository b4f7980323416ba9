"""Trials as configs to train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from composer.core import Time

from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.studies.planning import training_run
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import with_strategy
from composer_gradmatch.studies.verdict.trial import Trial

__all__ = ["TRAINING", "batches_of", "runs_of", "validating"]

#: What does these runs.
TRAINING = "composer_gradmatch.studies.training:training"


def validating(config: dict[str, Any], fraction: float, seed: int) -> dict[str, Any]:
    """Gives a copy that trains on the training set without its validation part, and evaluates on that part."""
    train = config["train_loader"]
    split = {"fraction": fraction, "seed": seed}
    kept = {key: value for key, value in (config.get("eval_loader") or {}).items() if key in _LOADERS_OWN}
    held = {key: train[key] for key in ("name", "dataset") if key in train}
    return {
        **config,
        "train_loader": {**train, "validation": {**split, "part": "train"}},
        "eval_loader": {**kept, **held, "validation": {**split, "part": "validation"}},
    }


_LOADERS_OWN = ("num_workers", "pin_memory", "prefetch_factor", "persistent_workers", "timeout")


def batches_of(config: dict[str, Any]) -> int | None:
    """Counts the batches of a whole run; None if its duration is in tokens."""
    duration = Time.from_input(config["max_duration"], "ep")
    ratio = config.get("scale_schedule_ratio") or 1.0
    size = config["global_train_batch_size"]
    if duration.unit.value == "ep":
        epoch = builder_of(config).batches(config)
        subset = config.get("train_subset_num_batches") or -1
        return int(duration.value * ratio) * (epoch if subset < 0 else min(epoch, subset))
    return {"ba": int(duration.value * ratio), "sp": int(duration.value * ratio) // size}.get(duration.unit.value)


def _shortened(config: dict[str, Any], share: float, batches: Callable[[dict[str, Any]], int | None]) -> dict[str, Any]:
    """Gives a copy whose duration and schedule are a share of what they are; epochs are counted in batches."""
    if share == 1:
        return config
    duration = Time.from_input(config["max_duration"], "ep")
    config = dict(config)
    if duration.unit.value == "ep":
        config["max_duration"] = f"{batches({**config, 'scale_schedule_ratio': 1.0})}ba"
    if config.get("scheduler"):
        return {**config, "scale_schedule_ratio": (config.get("scale_schedule_ratio") or 1.0) * share}
    duration = Time.from_input(config["max_duration"], "ep")
    return {**config, "max_duration": f"{max(1, int(duration.value * share))}{duration.unit.value}"}


def runs_of(
    config: dict[str, Any],
    kind: str,
    metric: str,
    label_noise: float,
    validation: float,
    seed: int,
    change: Callable[[dict[str, Any], float], dict[str, Any]] = lambda config, keep: config,
) -> Callable[[Trial], Run]:
    """Gives what turns a trial into a run.

    Args:
        config (dict[str, Any]): The user's.
        kind (str): Of the runs.
        metric (str): Its logged name.
        label_noise (float): Of the training labels; which ones are noisy depends on the run's seed.
        validation (float): The share of the training set that is split off, for trials that ask for it.
        seed (int): Of that split.
        change (Callable, optional): ``change(config, keep)``: what else is different at a keep. Default: nothing.
    """
    shortened: dict[tuple[float, str, float], dict[str, Any]] = {}
    counted: dict[tuple[str, int], int | None] = {}

    def count(data: str, config: dict[str, Any]) -> int | None:
        """Counts the batches of a whole run, once: it builds the loader."""
        place = (data, config["global_train_batch_size"])
        if place not in counted:
            counted[place] = batches_of(config)
        return counted[place]

    def run_of(trial: Trial) -> Run:
        place = (trial.share, trial.data, trial.cell[1])
        if place not in shortened:
            base = validating(config, validation, seed) if trial.data == "validation" else config
            shortened[place] = _shortened(change(base, trial.cell[1]), trial.share, partial(count, trial.data))
        strategy, keep = trial.cell
        own = with_strategy({**shortened[place], "seed": trial.seed}, strategy, keep)
        own["optimizer"] = {**own["optimizer"], "lr": trial.rate}
        settings = {"strategy": strategy, "keep": keep, "rate": trial.rate, "seed": trial.seed}
        settings |= {"share": trial.share, "data": trial.data, "label_noise": label_noise}
        return training_run(kind, settings, own, metric)

    return run_of
