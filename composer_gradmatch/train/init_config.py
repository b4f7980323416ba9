"""``--init``: a commented config to start from, for a model and data by their names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from composer_gradmatch.data import SHAPES
from composer_gradmatch.train.config import ConfigError, hints_of, show_type, with_overrides
from composer_gradmatch.train.registry import Factory, resolve
from composer_gradmatch.train.schema import check_config

__all__ = ["write_config"]

#: What OmegaConf takes for a value that is still to be given.
_MISSING = "???"
_COMMENTS = {
    "max_duration": "Epochs (ep) or batches (ba).",
    "global_train_batch_size": "M, the minibatch that samples are selected from, over all processes.",
    "model": "A module without a loss of its own needs num_classes; it is trained with cross-entropy.",
    "eval_loader": "Evaluated after each epoch.",
    "algorithms": "The strategy: gradmatch, random_backprop, ..., or a rule's name; null trains on everything.",
    "save_folder": "Checkpoints, logs and this config; null for none.",
}


def write_config(path: Path, model: str, data: str, overrides: Iterable[str] = ()) -> list[str]:
    """Writes a config.

    Args:
        path (Path): The YAML file; it must not be there.
        model (str): The model's name.
        data (str): The data set's.
        overrides (Iterable[str], optional): ``key.sub=value``, which are written in. Default: ``()``.

    Returns:
        list[str]: The keys whose values are still to be given.

    Raises:
        ConfigError: If the file is there or cannot be written, there is nothing of a name, or an override is wrong.
    """
    if path.exists():
        raise ConfigError(f"--init: {path} is there already. Name another file, or remove it.")
    model_factory, data_factory = _named("model", model), _named("data set", data)
    made = OmegaConf.create(_config(path.stem, model, model_factory, data, data_factory))
    config: Any = OmegaConf.to_container(with_overrides(made, overrides))
    missing = list(_missing(config))
    if not missing:
        check_config(config)
    try:
        path.write_text(_rendered(config, model_factory, data_factory))
    except OSError as error:
        raise ConfigError(f"--init: cannot write {path}: {error}.") from error
    return missing


def _named(kind: str, name: str) -> Factory:
    try:
        return resolve(kind, name)
    except ConfigError as error:
        raise ConfigError(f"--{'model' if kind == 'model' else 'data'}: {error}") from error


def _config(stem: str, model: str, model_factory: Factory, data: str, data_factory: Factory) -> dict[str, Any]:
    arguments = _required(model_factory)
    if "num_classes" in inspect.signature(model_factory).parameters:
        arguments["num_classes"] = SHAPES[data][1] if data in SHAPES else _MISSING
    options = _required(data_factory)
    has_splits = "split" in inspect.signature(data_factory).parameters
    train, test = ({**options, "split": split} if has_splits else options for split in ("train", "test"))
    return {
        "run_name": stem,
        "seed": 17,
        "max_duration": "30ep",
        "global_train_batch_size": 128,
        "precision": "fp32",
        "model": {"name": model, **arguments},
        "train_loader": {"name": data, "dataset": train, "shuffle": True, "drop_last": True},
        "eval_loader": {"name": data, "dataset": test} if has_splits else None,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5.0e-4},
        "scheduler": {"name": "cosine", "alpha_f": 0.0},
        "algorithms": {"gradmatch": {"start": 0.0, "end": 1.0, "keep": 0.3, "interrupt": 0}},
        "loggers": {"file": {}},
        "save_folder": "runs/{run_name}",
    }


def _parameters(factory: Factory) -> list[inspect.Parameter]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each for each in inspect.signature(factory).parameters.values() if each.kind in named]


def _required(factory: Factory) -> dict[str, Any]:
    return {each.name: _MISSING for each in _parameters(factory) if each.default is each.empty}


def _missing(value: Any, name: str = "") -> Iterable[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _missing(item, f"{name}.{key}" if name else key)
    elif value == _MISSING:
        yield name


def _rendered(config: dict[str, Any], model: Factory, data: Factory) -> str:
    """Writes a config with its comments, and with what else the model and the data set take."""
    lines = []
    for key, value in config.items():
        lines += [f"# {_COMMENTS[key]}"] if key in _COMMENTS else []
        if key in ("model", "train_loader") and isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {_flow(item)}" for name, item in value.items())]
            given = value if key == "model" else value.get("dataset") or {}
            lines += _left_out(model if key == "model" else data, given, "" if key == "model" else "dataset.")
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()


def _left_out(factory: Factory, given: dict[str, Any], prefix: str) -> list[str]:
    """Tells in comments which arguments have their defaults."""
    hints = hints_of(factory)
    return [
        f"  # {prefix}{each.name}: {_flow(each.default)}  # {show_type(hints.get(each.name, Any))}"
        for each in _parameters(factory)
        if each.name not in given and isinstance(each.default, int | float | str | list | None)
    ]
