"""The runs that a study consists of, planned and checked before the first one starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from composer.core import Time
from composer.models import HuggingFaceModel

from composer_gradmatch.studies.configs import learning_rate, quiet, with_label_noise
from composer_gradmatch.studies.step_time import step_time_run
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import with_strategy
from composer_gradmatch.train import check_config
from composer_gradmatch.train.builders import build_algorithms, build_loader, build_named, try_parts
from composer_gradmatch.train.config import ConfigError

__all__ = [
    "check_study",
    "identity",
    "plan_accuracy",
    "plan_gradient_error",
    "plan_learning_rate",
    "plan_step_time",
    "scaled_batch_size",
]


def cells(strategies: Iterable[str], keeps: Iterable[float]) -> list[tuple[str, float]]:
    """The pairs (strategy, keep) of a study; the full batch is there once, with keep 1."""
    keeps = list(keeps)
    return [(s, k) for s in strategies for k in ([1.0] if s == "full" else keeps)]


def identity(study: str, config: dict[str, Any], **shared: Any) -> dict[str, Any]:
    """What all runs of a study share; the config's seed and names of files are not of it."""
    dropped = ("seed", "run_name", "save_folder", "loggers", "callbacks", "progress_bar")
    return {"study": study, "config": {k: v for k, v in config.items() if k not in dropped}, **shared}


def check_study(config: dict[str, Any], runs: Sequence[Run]) -> None:
    """Checks a study's configs, and that its data are there, before any run starts.

    Raises:
        ConfigError: If a run could not work.
    """
    check_config(config)
    batch_sizes = {}
    eval_loader = None
    for run in runs:
        check_config(run.config)
        try:
            build_algorithms(run.config.get("algorithms"))
            try_parts(run.config)
        except ConfigError as error:
            raise ConfigError(f"{run.key}: {error}") from error
        batch_sizes[run.config["global_train_batch_size"]] = run.config["train_loader"]
        eval_loader = run.config.get("eval_loader")
    if any(map(_uses_composers, runs)) and isinstance(build_named("model", config["model"]), HuggingFaceModel):
        raise ConfigError(
            "--strategies: Composer's SelectiveBackprop takes no HuggingFace model (its batches are no pairs, its loss "
            "no function). Leave selective_backprop out; loss samples as it does: --strategies full random loss "
            "gradmatch."
        )
    for batch_size, section in batch_sizes.items():
        build_loader(section, batch_size, "train_loader")
    if eval_loader:
        build_loader(eval_loader, 1, "eval_loader")


def _uses_composers(run: Run) -> bool:
    variants = [variant[0] for variant in run.options.get("variants", [])]
    return "selective_backprop" in [*variants, *(run.config.get("algorithms") or {})]


def _scaled(config: dict[str, Any], keep: float, batch_size: str) -> dict[str, Any]:
    """M = M_base/keep for ``scaled`` (App. C.2), so that m is M_base whatever is kept."""
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


def plan_accuracy(
    config: dict[str, Any],
    strategies: Sequence[str],
    keeps: Sequence[float],
    seeds: int,
    *,
    metric: str,
    label_noise: float = 0.0,
    batch_size: str = "fixed",
    rounds: int = 10,
) -> tuple[Run, list[Run]]:
    """The accuracy study: the run that times its strategies' steps, and its training runs, seed by seed."""
    runs = []
    pairs = cells(strategies, keeps)
    for seed, (strategy, keep) in product(range(seeds), pairs):
        settings = {"strategy": strategy, "keep": keep, "seed": seed}
        settings |= {"label_noise": label_noise, "batch_size": batch_size}
        own = _scaled(with_strategy({**config, "seed": seed}, strategy, keep), keep, batch_size)
        run = Run("accuracy", settings, quiet(with_label_noise(own, label_noise, seed), ""), {"metric": metric})
        run.config["run_name"] = run.key
        runs.append(run)
    base = config["global_train_batch_size"]
    sizes = [(s, k, scaled_batch_size(base, k) if batch_size == "scaled" and k < 1 else base) for s, k in pairs]
    timing = step_time_run(quiet({**config, "seed": 0}, "step-time"), sizes, rounds)
    return timing, runs


def plan_learning_rate(
    config: dict[str, Any],
    strategies: Sequence[str],
    keeps: Sequence[float],
    seeds: int,
    *,
    metric: str,
    factors: Sequence[float],
    label_noise: float = 0.0,
) -> list[Run]:
    """Appendix C.4: the learning rate times β, the schedule stretched to T/β, for each β of a grid."""
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
        run = Run("learning-rate", settings, quiet(with_label_noise(own, label_noise, seed), ""), {"metric": metric})
        run.config["run_name"] = run.key
        runs.append(run)
    return runs


def plan_gradient_error(
    config: dict[str, Any],
    strategies: Sequence[str],
    keeps: Sequence[float],
    seeds: int,
    *,
    minibatches: int,
    mode: str,
    checkpoint: str,
    label_noise: float = 0.0,
) -> list[Run]:
    """§5.3: a run for each seed, in which all strategies see the same minibatches."""
    if checkpoint and "://" not in checkpoint and not Path(checkpoint).is_file():
        raise ConfigError(f"--checkpoint: there is no file {checkpoint}. Give a checkpoint that Composer has saved.")
    pairs = [("full", 1.0), *(pair for pair in cells(strategies, keeps) if pair[0] != "full")]
    named = " ".join(f"{strategy}:{keep:g}" for strategy, keep in pairs)
    shared = {"variants": named, "minibatches": minibatches, "mode": mode, "checkpoint": checkpoint}
    return [
        Run(
            "gradient-error",
            {"seed": seed, "label_noise": label_noise, **shared},
            quiet(with_label_noise({**config, "seed": seed, "eval_loader": None}, label_noise, seed), f"errors-{seed}"),
            {"variants": [list(pair) for pair in pairs], "minibatches": minibatches},
        )
        for seed in range(seeds)
    ]


def plan_step_time(
    config: dict[str, Any], strategies: Sequence[str], keeps: Sequence[float], *, rounds: int, synthetic: bool
) -> Run:
    """Table 1: one run that times all strategies side by side."""
    size = config["global_train_batch_size"]
    variants = [(strategy, keep, size) for strategy, keep in cells(strategies, keeps)]
    own = quiet({**config, "seed": 0, "eval_loader": None}, "step-time")
    return step_time_run(own, variants, rounds, synthetic=synthetic)
