"""What a study builds of a config: by the names in it, or by a function of the user's that the config stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from composer import Trainer
from composer.models import HuggingFaceModel

from composer_gradmatch.studies.store import Run
from composer_gradmatch.train import build_trainer, check_config
from composer_gradmatch.train.builders import build_algorithms, build_loader, build_named, try_parts
from composer_gradmatch.train.run_summary import RunSummary

__all__ = ["MAKE", "Builder", "builder_of", "built_by"]

#: The key of a config that stands for a function; no YAML has it.
MAKE = "make"


class Builder(Protocol):
    """Builds what a study needs of its configs; whatever it refuses is a :class:`.ConfigError`."""

    #: Whether this process alone has what it builds by, so that others must be sent the builder.
    here: bool

    def check(self, config: dict[str, Any]) -> None:
        """Checks a config as a whole."""
        ...

    def check_run(self, config: dict[str, Any]) -> None:
        """Checks the config of a run, and builds what costs nothing to build."""
        ...

    def check_data(self, runs: Sequence[Run]) -> None:
        """Checks that the runs' data are there, and give batches."""
        ...

    def trainer(self, config: dict[str, Any], summary: RunSummary | None = None) -> Trainer:
        """Builds the Trainer of a run, to be closed by the caller."""
        ...

    def metrics(self, config: dict[str, Any]) -> list[str]:
        """Names the model's evaluation metrics."""
        ...

    def is_huggingface(self, config: dict[str, Any]) -> bool:
        """Tells whether the model is a HuggingFaceModel."""
        ...

    def batches(self, config: dict[str, Any]) -> int:
        """Counts the batches of an epoch."""
        ...

    def test_samples(self, config: dict[str, Any]) -> int:
        """Counts the samples to evaluate on."""
        ...


class ByNames:
    """Builds by the names in a config, as the YAML runner does."""

    here = False

    def check(self, config: dict[str, Any]) -> None:
        """Checks a config: see :func:`.check_config`."""
        check_config(config)

    def check_run(self, config: dict[str, Any]) -> None:
        """Checks a config, and builds its algorithms, callbacks, optimizer and scheduler."""
        check_config(config)
        build_algorithms(config.get("algorithms"))
        try_parts(config)

    def check_data(self, runs: Sequence[Run]) -> None:
        """Builds the data loaders of all batch sizes."""
        for size, section in {
            run.config["global_train_batch_size"]: run.config["train_loader"] for run in runs
        }.items():
            build_loader(section, size, "train_loader")
        if runs and runs[-1].config.get("eval_loader"):
            build_loader(runs[-1].config["eval_loader"], 1, "eval_loader")

    def trainer(self, config: dict[str, Any], summary: RunSummary | None = None) -> Trainer:
        """Builds a Trainer: see :func:`.build_trainer`."""
        return build_trainer(config, summary)

    def metrics(self, config: dict[str, Any]) -> list[str]:
        """Names the model's evaluation metrics."""
        return list(build_named("model", config["model"]).get_metrics(is_train=False))

    def is_huggingface(self, config: dict[str, Any]) -> bool:
        """Tells whether the model is a HuggingFaceModel."""
        return isinstance(build_named("model", config["model"]), HuggingFaceModel)

    def batches(self, config: dict[str, Any]) -> int:
        """Counts the batches of an epoch."""
        return len(build_loader(config["train_loader"], config["global_train_batch_size"], "train_loader"))

    def test_samples(self, config: dict[str, Any]) -> int:
        """Counts the samples of the data set to evaluate on."""
        return len(build_loader(config["eval_loader"], 1, "eval_loader"))


_BY_NAMES = ByNames()
_built_by: dict[str, Builder] = {}


def builder_of(config: dict[str, Any]) -> Builder:
    """Finds what builds a config, or one that was made of it."""
    return _built_by.get(str(config.get(MAKE)), _BY_NAMES)


@contextmanager
def built_by(builder: Builder, config: dict[str, Any]) -> Iterator[None]:
    """Has a builder build a config, and all that are made of it, within."""
    key = str(config.get(MAKE))
    before = _built_by.get(key)
    _built_by[key] = builder
    try:
        yield
    finally:
        if before is None:
            del _built_by[key]
        else:
            _built_by[key] = before
