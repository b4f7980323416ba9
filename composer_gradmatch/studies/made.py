"""A user's function that makes a Trainer's arguments, as a study's config and what builds it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer import Trainer
from composer.algorithms import SelectiveBackprop
from composer.core import Time
from composer.models import ComposerModel, HuggingFaceModel
from composer.utils import reproducibility
from torch.utils.data import DataLoader

from composer_gradmatch.algorithms.select_first import select_first
from composer_gradmatch.algorithms.subset_backprop import SubsetBackprop
from composer_gradmatch.batches.sample_numbers import NumberedSamples
from composer_gradmatch.data import NoisyLabels, validation_part
from composer_gradmatch.studies.building import MAKE
from composer_gradmatch.studies.loaders import batch_size_of, remade, seed_loader, shuffles
from composer_gradmatch.studies.store import Run
from composer_gradmatch.train.builders import build_algorithms
from composer_gradmatch.train.config import ConfigError, nearest
from composer_gradmatch.train.run_summary import RunSummary
from composer_gradmatch.train.trainer import needs_numbers

__all__ = ["Made"]

_NEEDED = ("model", "train_dataloader", "eval_dataloader", "optimizers", "max_duration")
#: What a study says itself, or leaves out as it writes no checkpoint.
_STUDYS = ("seed", "run_name", "autoresume", "load_path", "progress_bar", "log_to_console", "scale_schedule_ratio")
_STUDYS_TOO = ("save_folder", "save_interval", "save_filename", "save_overwrite", "save_num_checkpoints_to_keep")
#: Numbers of the Trainer's that studies reckon with, and change.
_RECKONED = ("train_subset_num_batches", "eval_subset_num_batches", "device_train_microbatch_size")
_TRAINER = inspect.signature(Trainer).parameters


class Made:
    """Builds a study's runs by a function of the user's; see :class:`.Builder`.

    Args:
        make (Callable): Returns a Trainer's keyword arguments, made anew in each call. It is called with those of
            ``lr`` and ``seed`` that it takes.
        varies_rate (bool): Whether the study tries learning rates, so that it must take ``lr``.
        algorithms (dict[str, Any], optional): ``algorithms`` as a config has them. Default: ``None``.
        version (str, optional): Of what the function uses. Default: ``""``.

    Attributes:
        config (dict[str, Any]): What it makes, as far as a study reckons with it.

    Raises:
        ConfigError: If it makes no Trainer's arguments, or ignores its ``lr``.
    """

    here = True

    def __init__(
        self,
        make: Callable[..., dict[str, Any]],
        varies_rate: bool,
        algorithms: dict[str, Any] | None = None,
        version: str = "",
    ) -> None:
        self._make = make
        self.name = getattr(make, "__name__", type(make).__name__)
        parameters = inspect.signature(make).parameters
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._takes = {name for name in ("lr", "seed") if name in parameters or takes_all}
        default = parameters["lr"].default if "lr" in parameters else None
        own_rate = default if isinstance(default, int | float) and not isinstance(default, bool) else None
        if own_rate is None and (varies_rate or "lr" in parameters):
            raise ConfigError(
                f"{self.name}: it must take the learning rate as lr, whose default is the one that others are tried "
                f"around, e.g. def {self.name}(lr=0.1, seed=0), and give it to its optimizer."
            )
        if own_rate is None:
            self._takes.discard("lr")
        first = self._call(None, 0)
        self._check_again(first, own_rate)
        rate = float(first["optimizers"].param_groups[0]["lr"] if own_rate is None else own_rate)
        self.config = self._describe(first, rate, algorithms or {}, version)
        self._metrics = list(first["model"].get_metrics(is_train=False))
        self._is_huggingface = isinstance(first["model"], HuggingFaceModel)

    def _call(self, rate: float | None, seed: int) -> dict[str, Any]:
        """Calls the function, seeded, and checks what it returns."""
        reproducibility.seed_all(seed)
        own = {"lr": rate, "seed": seed}
        made = self._make(**{k: v for k, v in own.items() if k in self._takes and v is not None})
        if not isinstance(made, dict):
            raise ConfigError(
                f"{self.name}: expected a dict of a Trainer's arguments, got {type(made).__name__}. Return "
                f"dict({', '.join(f'{key}=...' for key in _NEEDED)})."
            )
        if missing := [key for key in _NEEDED if made.get(key) is None]:
            raise ConfigError(
                f"{self.name}: {missing[0]} is missing from what it returns; a study needs {', '.join(_NEEDED)}."
            )
        if unknown := [key for key in made if key not in _TRAINER]:
            raise ConfigError(f"{self.name}: Trainer takes no {unknown[0]!r}; {nearest(unknown[0], _TRAINER)}")
        made = {key: value for key, value in made.items() if key not in (*_STUDYS, *_STUDYS_TOO)}
        self._check_types(made)
        return made

    def _check_types(self, made: dict[str, Any]) -> None:
        if not isinstance(made["model"], ComposerModel):
            raise ConfigError(
                f"{self.name}: model must be a ComposerModel, e.g. ComposerClassifier(module, num_classes=10); got "
                f"{type(made['model']).__name__}."
            )
        for key in ("train_dataloader", "eval_dataloader"):
            if not isinstance(made[key], DataLoader):
                raise ConfigError(f"{self.name}: {key} must be a torch DataLoader; got {type(made[key]).__name__}.")
        if isinstance(made["optimizers"], list | tuple) and len(made["optimizers"]) == 1:
            made["optimizers"] = made["optimizers"][0]
        if not isinstance(made["optimizers"], torch.optim.Optimizer):
            raise ConfigError(f"{self.name}: optimizers must be one torch optimizer; got {made['optimizers']!r}.")
        own = set(map(id, made["model"].parameters()))
        if any(id(each) not in own for group in made["optimizers"].param_groups for each in group["params"]):
            raise ConfigError(f"{self.name}: the optimizer's parameters are not the model's. Make both in each call.")
        algorithms = made.get("algorithms") or []
        made["algorithms"] = list(algorithms) if isinstance(algorithms, list | tuple) else [algorithms]
        for each in made["algorithms"]:
            if isinstance(each, SubsetBackprop | SelectiveBackprop):
                raise ConfigError(
                    f"{self.name}: leave {type(each).__name__} out of its algorithms: the study adds one strategy "
                    "after another. Its arguments go into the study's own algorithms={'gradmatch': {...}}."
                )

    def _check_again(self, first: dict[str, Any], rate: float | None) -> None:
        """Checks that a second call makes another model, and one with another rate another rate."""
        second = self._call(None if rate is None else rate / 2, 0)
        if second["model"] is first["model"]:
            raise ConfigError(
                f"{self.name}: it returns the same model in each call, so that one run would go on with the weights of "
                "another. Make the model inside of it."
            )
        rates = [[group["lr"] for group in made["optimizers"].param_groups] for made in (first, second)]
        if rate and rates[0] == rates[1]:
            raise ConfigError(
                f"{self.name}: it ignores its lr: the optimizer has the rate {rates[0][0]:g} with lr={rate:g} and with "
                f"lr={rate / 2:g}. Give lr to the optimizer."
            )

    def _describe(self, made: dict[str, Any], rate: float, algorithms: dict[str, Any], version: str) -> dict[str, Any]:
        """Gives what a study reckons with; with it, a folder of results knows its function again."""
        train, evaluation = made["train_dataloader"], made["eval_dataloader"]
        size = sum(each.numel() for each in made["model"].parameters())
        config = {
            MAKE: {"name": self.name, "source": source_of(self._make), "version": version},
            "max_duration": Time.from_input(made["max_duration"], "ep").to_timestring(),
            "global_train_batch_size": batch_size_of(train, "train_dataloader"),
            "device_eval_batch_size": batch_size_of(evaluation, "eval_dataloader"),
            "model": {"name": type(made["model"]).__name__, "parameters": size},
            "optimizer": {"name": type(made["optimizers"]).__name__, "lr": rate},
            "train_loader": {"samples": _length(train)},
            "eval_loader": {"samples": _length(evaluation)},
            "algorithms": algorithms,
            **{key: made[key] for key in _RECKONED if made.get(key) is not None},
        }
        named = {"scheduler": made.get("schedulers"), "callbacks": made.get("callbacks")}
        return config | {key: {"name": "made"} for key, value in named.items() if value}

    def check(self, config: dict[str, Any]) -> None:
        """Does nothing: what the function makes has been checked."""

    def check_run(self, config: dict[str, Any]) -> None:
        """Builds the run's algorithms."""
        build_algorithms(config.get("algorithms"))

    def check_data(self, runs: Sequence[Run]) -> None:
        """Makes the loaders of all batch sizes, and of the validation part."""
        of_data = {
            str([run.config.get(key) for key in ("global_train_batch_size", "train_loader", "eval_loader")]): run.config
            for run in runs
        }
        for config in of_data.values():
            self._with_data(self._call(None, config["seed"]), config, build_algorithms(config.get("algorithms")))

    def metrics(self, config: dict[str, Any]) -> list[str]:
        """Names the model's evaluation metrics."""
        return self._metrics

    def is_huggingface(self, config: dict[str, Any]) -> bool:
        """Tells whether the model is a HuggingFaceModel."""
        return self._is_huggingface

    def batches(self, config: dict[str, Any]) -> int:
        """Counts the batches of an epoch."""
        loader = self._with_data(self._call(None, 0), config, [])["train_dataloader"]
        try:
            return len(loader)
        except TypeError:
            raise ConfigError(
                f"{self.name}: the length of train_dataloader is not known. Give max_duration in batches or samples."
            ) from None

    def test_samples(self, config: dict[str, Any]) -> int:
        """Counts the samples to evaluate on."""
        samples = config["eval_loader"]["samples"]
        if samples is None:
            raise ConfigError(f"{self.name}: the data set of eval_dataloader must have a length, for its resolution.")
        return samples

    def trainer(self, config: dict[str, Any], summary: RunSummary | None = None) -> Trainer:
        """Builds the Trainer of a run."""
        rate, seed = config["optimizer"]["lr"], config["seed"]
        made = self._call(rate or None, seed)
        algorithms = build_algorithms(config.get("algorithms"))
        made = self._with_data(made, config, algorithms)
        for loader in (made["train_dataloader"], made.get("eval_dataloader")):
            if loader is not None:
                seed_loader(loader, seed)
        if not rate:  # Weights are to be held still.
            for group in made["optimizers"].param_groups:
                group["lr"] = 0.0
        for key, of_config in {"schedulers": "scheduler", "callbacks": "callbacks"}.items():
            if not config.get(of_config):
                made.pop(key, None)
        if made["eval_dataloader"] is None:
            made.pop("eval_interval", None)
        reckoned = (*_RECKONED, "max_duration", "scale_schedule_ratio")
        passes = [each for each in _listed(made.get("algorithm_passes")) if each is not select_first]
        own = {
            **{key: config[key] for key in reckoned if key in config},
            "algorithms": [*made["algorithms"], *algorithms],
            "algorithm_passes": [select_first, *passes],
            "loggers": [*_listed(made.get("loggers")), *([] if summary is None else [summary])],
            "run_name": config.get("run_name"),
            "seed": seed,
            "progress_bar": False,
        }
        return Trainer(**{**{key: value for key, value in made.items() if key not in reckoned}, **own})

    def _with_data(self, made: dict[str, Any], config: dict[str, Any], algorithms: list[Any]) -> dict[str, Any]:
        """Gives the arguments with the loaders that a run's config asks for; as they are where it asks for nothing."""
        train, evaluation = made["train_dataloader"], made["eval_dataloader"]
        section, of_test = config["train_loader"], config.get("eval_loader")
        changes: dict[str, Any] = {}
        dataset: Any = train.dataset
        split = of_test.get("validation") if of_test else None
        why = "choosing learning rates on a validation part" if split else "label noise"
        if split or section.get("label_noise") is not None:
            shuffles(train, "train_dataloader", why)
        try:
            if split:
                part = validation_part(dataset, **split)
                evaluation = remade(train, "train_dataloader", why, like=evaluation, dataset=part)
            if section.get("label_noise") is not None:
                changes["dataset"] = dataset = NoisyLabels(dataset, **section["label_noise"])
            if section.get("validation") is not None:
                changes["dataset"] = validation_part(dataset, **section["validation"])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.name}: train_dataloader: {error}") from error
        if config["global_train_batch_size"] != batch_size_of(train, "train_dataloader"):
            changes["batch_size"] = config["global_train_batch_size"]
        if section.get("drop_last", train.drop_last) != train.drop_last:
            changes["drop_last"] = section["drop_last"]
        if needs_numbers(algorithms) and not isinstance(train.dataset, NumberedSamples):
            changes["numbered"] = True
        if changes:
            train = remade(train, "train_dataloader", " and ".join(changes), **changes)
        return {**made, "train_dataloader": train, "eval_dataloader": evaluation if of_test else None}


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _length(loader: DataLoader) -> int | None:
    try:
        return len(loader.dataset)  # pyright: ignore[reportArgumentType]  # A stream has none.
    except TypeError:
        return None


def source_of(function: Callable[..., Any]) -> str:
    """Gives the SHA-256 of a function's source, without comments and layout; ``"unknown"`` where there is none."""
    looked_at: Any = inspect.unwrap(getattr(function, "func", function))
    try:
        try:
            source = inspect.getsource(looked_at)
        except TypeError:  # An object that can be called.
            source = inspect.getsource(type(looked_at))
        text = ast.dump(ast.parse(textwrap.dedent(source)))
    except (OSError, TypeError, SyntaxError):  # Written in a plain shell, or a lambda in the middle of a line.
        return "unknown"
    return hashlib.sha256(text.encode()).hexdigest()
