"""From checked sections of a config to models, loaders, optimizers, schedulers, algorithms, callbacks and loggers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.core import Algorithm
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from composer_gradmatch.batches.sample_numbers import number_samples
from composer_gradmatch.data import NoisyLabels, validation_part
from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.refusals import refusing
from composer_gradmatch.train.registered_factories import with_loss
from composer_gradmatch.train.registry import resolve

__all__ = ["build_algorithms", "build_entries", "build_loader", "build_named", "try_parts"]


def build_named(kind: str, section: dict[str, Any], *args: Any) -> Any:
    """Builds what a checked section ``{name: ..., arguments ...}`` describes.

    Raises:
        ConfigError: If what it names needs a package or a file that is not there, or refuses a value.
    """
    with _refusing(f"{kind} {section['name']}"):
        return resolve(kind, section["name"])(*args, **{k: v for k, v in section.items() if k != "name"})


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turns what a constructor raises into an error of the config.

    These are the errors that a constructor refuses values with, whoever wrote it; of others, those that the user's own
    code had no part in.
    """
    with refusing(where):
        try:
            yield
        except ConfigError:
            raise
        except (OSError, ImportError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error


def build_entries(kind: str, entries: dict[str, Any] | None) -> list[Any]:
    """Builds the entries that are not switched off by ``false``.

    Raises:
        ConfigError: If one needs a package or a file that is not there, or refuses a value; it names the entry.
    """
    built = []
    for name, arguments in (entries or {}).items():
        if arguments is not False:
            with _refusing(f"{kind}s.{name}"):
                built.append(resolve(kind, name)(**with_loss(kind, arguments or {})))
    return built


def build_algorithms(entries: dict[str, Any] | None) -> list[Algorithm]:
    """Builds the algorithms, turning an argument's value that is refused into an error that names the entry.

    Raises:
        ConfigError: If an algorithm refuses a value.
    """
    return build_entries("algorithm", entries)


def try_parts(config: dict[str, Any]) -> None:
    """Builds what costs nothing to build, so that a value that it refuses is told of before data and model are built.

    Args:
        config (dict[str, Any]): Checked.

    Raises:
        ConfigError: If a callback, the scheduler or the optimizer refuses a value.
    """
    build_entries("callback", config.get("callbacks"))
    build_named("optimizer", config["optimizer"], [torch.nn.Parameter(torch.zeros(1))])
    if config.get("scheduler"):
        build_named("scheduler", config["scheduler"])


def build_loader(section: dict[str, Any], batch_size: int, where: str, numbered: bool = False) -> DataLoader:
    """Builds a data loader over a data set, with Composer's distributed sampler.

    Args:
        section (dict[str, Any]): Checked: name, dataset, shuffle, drop_last, label_noise (the arguments of
            :class:`.NoisyLabels`), validation (those of :func:`.validation_part`) and the loader's own arguments.
            Label noise is that of the whole data set, whichever part is loaded, and never in a validation part.
        batch_size (int): Samples a batch on this rank.
        where (str): The section's key, for the error message.
        numbered (bool, optional): Whether samples get their numbers, which a strategy's ``refresh`` asks for.
            Default: ``False``.

    Raises:
        ConfigError: If the data cannot be loaded, or there would be no batch.
    """
    own = ("name", "dataset", "label_noise", "validation")
    options = {key: value for key, value in section.items() if key not in own}
    shuffle, drop_last = options.pop("shuffle", False), options.pop("drop_last", False)
    with _refusing(where):
        dataset: Dataset = resolve("data set", section["name"])(**(section.get("dataset") or {}))
        split = section.get("validation")
        if section.get("label_noise") is not None and (split or {}).get("part") != "validation":
            dataset = NoisyLabels(dataset, **section["label_noise"])
        if split is not None:
            dataset = validation_part(dataset, **split)
        if numbered:
            dataset = number_samples(dataset)
            options["collate_fn"] = dataset.collate_fn
        sampler = dist.get_sampler(dataset, shuffle=shuffle, drop_last=drop_last)
        loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last, **options)
    if not len(loader):
        raise ConfigError(
            f"{where}: {len(sampler)} samples on each rank give no batch of {batch_size} with drop_last=true. Lower "
            "the batch size or set drop_last=false."
        )
    return loader
