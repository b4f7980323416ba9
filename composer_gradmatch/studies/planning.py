"""What the plans of several studies share: pairs of strategies and keeps, runs by seed, and checks before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.studies.configs import quiet, with_label_noise
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import STRATEGIES
from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.register_files import loaded_files

__all__ = ["cells", "check_study", "identity", "training_run"]


def cells(strategies: Iterable[str], keeps: Iterable[float]) -> list[tuple[str, float]]:
    """Gives the pairs (strategy, keep) of a study; the full batch is there once, with keep 1, as others of one keep."""
    keeps = list(keeps)
    own = {name: [each.arguments["keep"]] for name, each in STRATEGIES.items() if "keep" in each.arguments}
    return [(s, k) for s in strategies for k in {"full": [1.0], **own}.get(s, keeps)]


def identity(study: str, config: dict[str, Any], **shared: Any) -> dict[str, Any]:
    """Tells what all runs of a study share; the config's seed and names of files are not of it."""
    dropped = ("seed", "run_name", "save_folder", "loggers", "callbacks", "progress_bar")
    files = {file.name: digest for file, digest in loaded_files().items()}
    own = {"registered": files} if files else {}
    return {"study": study, "config": {k: v for k, v in config.items() if k not in dropped}, **own, **shared}


def check_study(config: dict[str, Any], runs: Sequence[Run]) -> None:
    """Checks a study's configs, and that its data are there, before any run starts.

    Raises:
        ConfigError: If a run could not work.
    """
    builder = builder_of(config)
    builder.check(config)
    for run in runs:
        try:
            builder.check_run(run.config)
        except ConfigError as error:
            raise ConfigError(f"{run.key}: {error}") from error
    if any(map(_uses_composers, runs)) and builder.is_huggingface(config):
        raise ConfigError(
            "--strategies: Composer's SelectiveBackprop takes no HuggingFace model (its batches are no pairs, its loss "
            "no function). Leave selective_backprop out; loss samples as it does: --strategies full random loss "
            "gradmatch."
        )
    builder.check_data(runs)


def _uses_composers(run: Run) -> bool:
    variants = [variant[0] for variant in run.options.get("variants", [])]
    return "selective_backprop" in [*variants, *(run.config.get("algorithms") or {})]


def training_run(kind: str, settings: dict[str, Any], config: dict[str, Any], metric: str) -> Run:
    """Gives a run that trains, without files of its own and under the name of its settings.

    Args:
        kind (str): The study's name.
        settings (dict[str, Any]): With ``seed`` and ``label_noise``.
        config (dict[str, Any]): What to train.
        metric (str): The logged name of the metric to keep.
    """
    noisy = with_label_noise(config, settings["label_noise"], settings["seed"])
    run = Run(kind, settings, quiet(noisy, ""), {"metric": metric})
    run.config["run_name"] = run.key
    return run
