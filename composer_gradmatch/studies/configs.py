"""A user's config, turned into the config of one run of a study."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from composer_gradmatch.data import SHAPES
from composer_gradmatch.studies.building import builder_of
from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.registry import resolve

__all__ = ["accuracy_metric", "learning_rate", "quiet", "with_label_noise", "with_synthetic_data"]


#: Callbacks that write into the folder of a run, and of one that selects.
_WRITING = ("selection_images", "selection_log")


def quiet(config: dict[str, Any], run_name: str) -> dict[str, Any]:
    """Gives a copy that writes no checkpoint, log file or picture, and shows no progress bar of its own."""
    loggers = {name: value for name, value in (config.get("loggers") or {}).items() if name != "file"}
    dropped = ("autoresume", "save_folder", "save_interval", "save_num_checkpoints_to_keep", "save_overwrite")
    kept = {key: copy.deepcopy(value) for key, value in config.items() if key not in dropped}
    if kept.get("callbacks"):
        kept["callbacks"] = {name: value for name, value in kept["callbacks"].items() if name not in _WRITING}
    own = {"run_name": run_name, "loggers": loggers, "save_folder": None, "progress_bar": False}
    return {**kept, **own}


def with_label_noise(config: dict[str, Any], fraction: float, seed: int) -> dict[str, Any]:
    """Gives a copy whose training labels are noisy; see :class:`.NoisyLabels`."""
    if not fraction:
        return config
    noise = {**(config["train_loader"].get("label_noise") or {}), "fraction": fraction, "seed": seed}
    return {**config, "train_loader": {**config["train_loader"], "label_noise": noise}}


def with_synthetic_data(config: dict[str, Any]) -> dict[str, Any]:
    """Gives a copy that trains on random tensors of its data set's shape.

    Raises:
        ConfigError: If the shape of the data set is not known.
    """
    name = config["train_loader"]["name"]
    if name == "synthetic":
        return config
    if name not in SHAPES:
        raise ConfigError(
            f"--synthetic: the shape of the data set {name!r} is not known (known: {', '.join(SHAPES)}). "
            "For images, give it: train_loader.name=synthetic "
            "train_loader.dataset='{input_shape: [3, 32, 32], num_classes: 10}'; texts are timed with their data."
        )
    shape, num_classes = SHAPES[name]
    samples = max(1024, 2 * config["global_train_batch_size"])
    dataset = {"input_shape": list(shape), "num_classes": num_classes, "num_samples": samples}
    # Tensors in memory need no worker processes.
    return {**config, "train_loader": {"name": "synthetic", "dataset": dataset, "shuffle": True}}


def accuracy_metric(config: dict[str, Any], metric: str | None) -> str:
    """Gives the logged name of the metric that a study compares, checked against the model's own.

    Args:
        config (dict[str, Any]): A checked config.
        metric (str, optional): The metric's name, e.g. ``"MulticlassAccuracy"``; higher must be better. None takes
            the one with Accuracy in its name.

    Raises:
        ConfigError: If there is no evaluation, or no such metric.
    """
    if not config.get("eval_loader"):
        raise ConfigError("eval_loader: missing; the study compares test accuracy. Add the data set's test split.")
    names = builder_of(config).metrics(config)
    found = [name for name in names if (name == metric if metric else "Accuracy" in name)]
    if not found:
        raise ConfigError(
            f"--metric: the model has no evaluation metric {metric or 'with Accuracy in its name'}; it has "
            f"{', '.join(names) or 'none'}. Name one of these (higher must be better)."
        )
    return f"metrics/eval/{found[0]}"


def learning_rate(config: dict[str, Any]) -> float:
    """Gives the config's learning rate, or its optimizer's default.

    Raises:
        ConfigError: If neither is a number.
    """
    optimizer = config["optimizer"]
    value = optimizer.get("lr")
    if "lr" not in optimizer:
        parameter = inspect.signature(resolve("optimizer", optimizer["name"])).parameters.get("lr")
        value = None if parameter is None else parameter.default
    if not isinstance(value, int | float):
        raise ConfigError("optimizer.lr: missing; the study scales the learning rate. Give one, e.g. 0.1.")
    return float(value)
