"""What shows that a config can be run only once it is: samples through the model, the Trainer, the first batch."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from composer.core import Callback, DataSpec, State
from composer.loggers import Logger
from composer.models import ComposerModel
from torch.utils.data import DataLoader, TensorDataset

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.batches.sample_numbers import NumberedSamples, without_numbers
from composer_gradmatch.forward.torch_private import is_of_compiler
from composer_gradmatch.train.config import ConfigError, one_line, parse_time
from composer_gradmatch.train.refusals import frames_of, refusing, touches_users_code
from composer_gradmatch.train.registry import resolve

__all__ = ["BatchesBegun", "check_samples", "refusing_key", "setting_up"]

_FEW = 2
#: Composer's functions that only the loading of a checkpoint calls from a Trainer of ours.
_LOADING = ("load_checkpoint", "maybe_create_object_store_from_uri")


def check_samples(
    config: dict[str, Any], model: ComposerModel, train: DataLoader, evaluation: DataLoader | None
) -> None:
    """Checks that the model takes the data's samples, where both come from this package's tables.

    A user's own model is left to show its own errors, as they are.

    Args:
        config (dict[str, Any]): Checked.
        model (ComposerModel): Built; it is as before.
        train (DataLoader): Of the training data.
        evaluation (DataLoader, optional): Of the data to evaluate on.

    Raises:
        ConfigError: If it takes none, has too few classes, or tokens are to be counted that samples have not.
    """
    _check_tokens(config, train)
    factory = resolve("model", config["model"]["name"])
    if not factory.__module__.startswith("composer_gradmatch."):
        return
    loaders = {"train_loader": train, "eval_loader": evaluation}
    for where, loader in loaders.items():
        if loader is not None:
            _check_classes(config, where, loader)
            with refusing(
                f"model {config['model']['name']} does not take the samples of {where} {config[where]['name']}"
            ):
                _run_a_few(model, loader)


def _check_tokens(config: dict[str, Any], loader: DataLoader) -> None:
    values = {key: config.get(key) for key in ("max_duration", "save_interval", "eval_interval")}
    times = {key: parse_time(value) for key, value in values.items() if isinstance(value, str)}
    counted = {key: values[key] for key, time in times.items() if time is not None and time.unit.value == "tok"}
    if config.get("accumulate_train_batch_on_tokens"):
        counted["accumulate_train_batch_on_tokens"] = True
    if counted and not DataSpec(loader).get_num_tokens_in_batch(_few_samples(loader)):
        key, value = next(iter(counted.items()))
        raise ConfigError(f"{key}: {value!r} counts tokens, and a batch of {config['train_loader']['name']} has none.")


def _few_samples(loader: DataLoader) -> Any:
    """Makes a batch of a loader's samples; the random numbers that the data set draws are as before."""
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        dataset: Any = loader.dataset
        batch: Any = loader.collate_fn([dataset[i] for i in range(min(_FEW, len(dataset)))])
    random.setstate(state[0])
    np.random.set_state(state[1])
    return without_numbers(batch) if isinstance(dataset, NumberedSamples) else batch


def _run_a_few(model: ComposerModel, loader: DataLoader) -> None:
    batch = _few_samples(loader)
    flags = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()
        model.loss(model(batch), batch)
    for module, training in flags:
        module.training = training


def _check_classes(config: dict[str, Any], where: str, loader: DataLoader) -> None:
    """Checks that there is an output for each class, where the data set has its labels at hand."""
    section = config["model"]
    parameters = inspect.signature(resolve("model", section["name"])).parameters
    name = next((name for name in ("num_classes", "num_labels") if name in parameters), None)
    dataset: Any = loader.dataset
    if isinstance(dataset, NumberedSamples):
        dataset = dataset.dataset
    if isinstance(dataset, TensorDataset):
        labels = dataset.tensors[-1]
    else:
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    found = np.asarray([] if labels is None else labels)
    if name is None or not found.size or not np.issubdtype(found.dtype, np.integer):
        return
    classes, needed = section.get(name, parameters[name].default), int(found.max()) + 1
    if classes < needed:
        raise ConfigError(f"model.{name}: expected at least {needed}, the classes of {where}; got {classes}.")


class BatchesBegun(Callback):
    """Counts the batches that a run has begun to fetch."""

    def __init__(self) -> None:
        self.count = 0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Counts one more."""
        self.count += 1


@contextmanager
def setting_up(config: dict[str, Any], what: str, begun: BatchesBegun | None = None) -> Iterator[None]:
    """Turns what fails while a run is set up, its first batch included, into an error of the config.

    The line: what has touched the user's own code passes as it is, and so does everything once the second batch has
    been begun. By then each entry of the config has done its work once, and what fails is a bug, or training's doing.

    Args:
        config (dict[str, Any]): Checked.
        what (str): What is being done, for the message.
        begun (BatchesBegun, optional): The run's batches so far; None if it has none yet. Default: ``None``.

    Raises:
        ConfigError: In the place of such an exception, with the key of the entry that raised it, if one did.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if touches_users_code(error) or (begun is not None and begun.count > 1):
            raise
        key = refusing_key(config, error)
        raise ConfigError(f"{'' if key is None else f'{key}: '}{what}: {one_line(error)}") from error


def refusing_key(config: dict[str, Any], error: BaseException) -> str | None:
    """Gives the config's key whose object an exception was raised in, or the innermost one; None if there is none.

    Args:
        config (dict[str, Any]): Checked.
        error (BaseException): With its traceback.
    """
    factories = dict(_factories(config))
    for frame in reversed(frames_of(error)):
        own, module = frame.f_locals.get("self"), frame.f_globals.get("__name__", "")
        if module == "composer.trainer.trainer":
            # The optimizer calls the whole of the Trainer's step: what that raises is not the optimizer's doing.
            return None
        if isinstance(own, RuleBackprop) and (key := f"algorithms.{own.rule.name}") in factories:
            return key
        for key, factory in factories.items():
            if (inspect.isclass(factory) and isinstance(own, factory)) or module == factory.__module__:
                return key
        if module.startswith("composer.") and frame.f_code.co_name in _LOADING:
            return "load_path"
        if module == "composer.callbacks.checkpoint_saver":
            return "save_filename" if frame.f_code.co_name == "fit_start" else "save_folder"
        if is_of_compiler(module) and config.get("compile_config") is not None:
            return "compile_config"
    return None


def _factories(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for kind in ("algorithm", "callback", "logger"):
        for name, arguments in (config.get(f"{kind}s") or {}).items():
            if arguments is not False:
                yield f"{kind}s.{name}", resolve(kind, name)
    for kind in ("optimizer", "scheduler"):
        if config.get(kind):
            yield kind, resolve(kind, config[kind]["name"])
