"""What a run's folder tells of its picks: the log, and the data set with its labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from composer_gradmatch.data.label_noise import NoisyLabels, labels_of
from composer_gradmatch.studies.tables import Table
from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.registry import resolve

__all__ = ["PickedFrom", "read_run"]


@dataclass(frozen=True)
class PickedFrom:
    """A run that has a log.

    Attributes:
        name (str): Its name.
        strategy (str): What selected, and how much.
        log (pd.DataFrame): A row for each epoch and sample: see :class:`.SelectionLog`.
        dataset (Any): What was trained on, without label noise.
        labels (np.ndarray, optional): The labels that were trained on, shape (N,); None if they are no classes.
        true_labels (np.ndarray, optional): Those before label noise; None where none was injected.
    """

    name: str
    strategy: str
    log: Table
    dataset: Any
    labels: np.ndarray | None
    true_labels: np.ndarray | None


def read_run(folder: Path) -> PickedFrom:
    """Reads a run's folder, and the data set that its config names.

    Raises:
        ConfigError: If it is no run's, has no log, or the data set is not there or has another number of samples.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError("there is no config.yaml: expected the folder of a run, for instance runs/digits-gradmatch.")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    files = sorted((folder / "selection_log").glob("ep*.parquet"))
    if not files:
        raise ConfigError(
            "there is no selection_log: train with callbacks.selection_log='{}' and a refresh, for instance "
            "algorithms.gradmatch.refresh=1ep."
        )
    try:
        log = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    except ImportError as error:
        raise ConfigError(f"{error} It comes by: pip install 'composer-gradmatch[studies]'.") from error
    section = config["train_loader"]
    try:
        dataset = resolve("data set", section["name"])(**(section.get("dataset") or {}))
        noise = section.get("label_noise")
        noisy = None if noise is None else NoisyLabels(dataset, **noise)
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"train_loader: {error}") from error
    if log["sample"].nunique() != len(dataset):
        raise ConfigError(
            f"the log has {log['sample'].nunique():,} samples, but {section['name']} has {len(dataset):,}: it is not "
            "the data set that was trained on."
        )
    labels, true_labels = (_classes(dataset), None) if noisy is None else (noisy.noisy_labels, noisy.original_labels)
    return PickedFrom(config["run_name"], _strategy(config), log, dataset, labels, true_labels)


def _classes(dataset: Any) -> np.ndarray | None:
    try:
        return labels_of(dataset)
    except ValueError:  # Targets of another kind: the summary says that there are no classes.
        return None


def _strategy(config: dict[str, Any]) -> str:
    logged = {name: arguments for name, arguments in (config.get("algorithms") or {}).items() if arguments}
    parts = [f"{name}, keep {each['keep']}" for name, each in logged.items() if "refresh" in each and "keep" in each]
    return "; ".join(parts)
