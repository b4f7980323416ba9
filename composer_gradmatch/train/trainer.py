"""The entry point: a YAML config and overrides → ``Trainer.fit``.

``python -m composer_gradmatch.train.command CONFIG [key=value ...]``, or on several processes
``composer -n 2 -m composer_gradmatch.train.command CONFIG [key=value ...]``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from composer import Trainer
from composer.core import Algorithm
from composer.utils import dist, get_device, reproducibility
from composer.utils.file_helpers import format_name_with_dist

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.algorithms.select_first import select_first
from composer_gradmatch.forward.composer_private import generated_run_name
from composer_gradmatch.train.builders import (
    build_algorithms,
    build_entries,
    build_loader,
    build_named,
    try_parts,
)
from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.refusals import refusing
from composer_gradmatch.train.register_files import loaded_files
from composer_gradmatch.train.run_summary import RunSummary
from composer_gradmatch.train.schema import TRAINER_KEYS, check_config
from composer_gradmatch.train.setting_up import BatchesBegun, check_samples, setting_up

__all__ = ["build_trainer", "expect_small_batches", "needs_numbers", "train"]


def _run_folder(config: dict[str, Any], run_name: str) -> Path | None:
    folder = config.get("save_folder", "runs/{run_name}")
    return Path(format_name_with_dist(folder, run_name)) if folder else None


def _prepare_run_folder(config: dict[str, Any], folder: Path) -> None:
    """Makes a run's folder; refuses one that holds another run."""
    try:
        taken = folder.is_dir() and any(path.name == "config.yaml" or path.suffix == ".pt" for path in folder.iterdir())
    except OSError as error:
        raise ConfigError(f"save_folder: cannot look into {folder}: {error}.") from error
    if taken and not (config.get("autoresume") or config.get("save_overwrite")):
        raise ConfigError(
            f"save_folder: {folder} already holds a run. Choose another run_name=..., continue it with "
            "autoresume=true, or replace it with save_overwrite=true."
        )
    dist.barrier()
    if dist.get_global_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"save_folder: cannot make the folder {folder}: {error}.") from error


def _free_run_folder(config: dict[str, Any], run_name: str) -> None:
    """Leaves the folder of a run that was refused on its first batch to the next, unless it has a checkpoint."""
    folder = _run_folder(config, run_name)
    if folder is not None and dist.get_global_rank() == 0 and not list(folder.glob("*.pt")):
        (folder / "config.yaml").unlink(missing_ok=True)


def _with_log_file(loggers: dict[str, Any] | None, folder: Path | None) -> dict[str, Any]:
    """Puts the file logger's file into the run folder, beside what earlier parts of the run have logged.

    Composer 0.32's FileLogger truncates an existing file whatever its ``overwrite`` says.
    """
    loggers = dict(loggers or {})
    arguments = loggers.get("file", False)
    if arguments is False or folder is None or "filename" in (arguments or {}):
        return loggers
    part = 1
    while list(folder.glob(f"logs-part{part}-rank*.txt")):
        part += 1
    part = dist.all_gather_object(part)[0]
    loggers["file"] = {**(arguments or {}), "filename": f"{folder}/logs-part{part}-rank{{rank}}.txt"}
    return loggers


def needs_numbers(algorithms: Sequence[Algorithm]) -> bool:
    """Tells whether an algorithm keeps what it saw of samples that have no numbers of their own."""
    with_store = [each for each in algorithms if isinstance(each, RuleBackprop) and each.refresh is not None]
    return any(each.sample_id_key is None for each in with_store)


def build_trainer(config: dict[str, Any], summary: RunSummary | None = None) -> Trainer:
    """Builds the Trainer that a config describes; no step is made.

    Args:
        config (dict[str, Any]): As :func:`.load_config` returns it.
        summary (RunSummary, optional): Gathers the closing table. Default: ``None``.

    Returns:
        Trainer: With the data loaded and the model built, to be closed by the caller.

    Raises:
        ConfigError: If the config cannot be run.
    """
    check_config(config)
    algorithms = build_algorithms(config.get("algorithms"))
    try_parts(config)
    with refusing("device"):
        device = get_device(config.get("device"))
    dist.initialize_dist(device, config.get("dist_timeout", 300.0))
    seed = config.get("seed")
    seed = reproducibility.get_random_seed() if seed is None else seed
    seed = dist.all_gather_object(seed)[0]
    reproducibility.seed_all(seed)

    global_batch_size, world_size = config["global_train_batch_size"], dist.get_world_size()
    if global_batch_size % world_size:
        raise ConfigError(
            f"global_train_batch_size: {global_batch_size} cannot be divided among {world_size} processes. Choose a "
            f"multiple of {world_size}."
        )
    batch_size = global_batch_size // world_size
    train_loader = build_loader(config["train_loader"], batch_size, "train_loader", needs_numbers(algorithms))
    eval_loader = None
    if config.get("eval_loader"):
        eval_batch_size = config.get("device_eval_batch_size", batch_size)
        eval_loader = build_loader(config["eval_loader"], eval_batch_size, "eval_loader")
    model = build_named("model", config["model"])
    check_samples(config, model, train_loader, eval_loader)
    optimizer = build_named("optimizer", config["optimizer"], model.parameters())
    scheduler = build_named("scheduler", config["scheduler"]) if config.get("scheduler") else None

    run_name = config.get("run_name") or generated_run_name()
    folder = _run_folder(config, run_name)
    loggers = build_entries("logger", _with_log_file(config.get("loggers"), folder))
    if folder is not None:
        _prepare_run_folder(config, folder)
    arguments: dict[str, Any] = {
        "device_train_microbatch_size": batch_size,
        **({} if eval_loader is None else {"eval_interval": "1ep"}),
        "precision": "fp32",
        **{key: config[key] for key in TRAINER_KEYS if key in config},
        "run_name": run_name,
        "seed": seed,
        "device": device,
    }
    if "save_filename" in arguments:
        # Composer's checkpoint names know no {run_name}, though its documentation has one in them.
        arguments["save_filename"] = arguments["save_filename"].replace("{run_name}", run_name)
    callbacks = build_entries("callback", config.get("callbacks"))
    with setting_up(config, "the Trainer refused the config"):
        trainer = Trainer(
            model=model,
            train_dataloader=train_loader,
            eval_dataloader=eval_loader,
            optimizers=optimizer,
            schedulers=scheduler,
            algorithms=algorithms,
            algorithm_passes=[select_first],
            callbacks=callbacks,
            loggers=[*loggers, *([] if summary is None else [summary])],
            save_folder=None if folder is None else str(folder),
            **arguments,
        )
    # Only now: what could not be built holds no run, and may be tried again.
    if folder is not None and dist.get_global_rank() == 0:
        resolved = {**config, "run_name": run_name, "seed": seed}
        files = "".join(f"# --register {file}, SHA-256 {digest}\n" for file, digest in loaded_files().items())
        (folder / "config.yaml").write_text(files + yaml.safe_dump(resolved, sort_keys=False))
    return trainer


def expect_small_batches() -> None:
    """Silences, in this process, what Composer remarks on batches smaller than a microbatch: selection makes them."""
    warnings.filterwarnings("ignore", "Cannot split tensor of length", UserWarning)


def train(config: dict[str, Any]) -> Trainer:
    """Trains what a config describes and prints a short table at the end.

    Args:
        config (dict[str, Any]): As :func:`.load_config` returns it.

    Returns:
        Trainer: After training, closed.

    Raises:
        ConfigError: If the config cannot be run.
    """
    expect_small_batches()
    summary = RunSummary()
    trainer = build_trainer(config, summary)
    begun = BatchesBegun()
    trainer.state.callbacks.append(begun)
    try:
        with setting_up(config, "the run failed on its first batch", begun):
            trainer.fit()
        table = summary.table(trainer.state)
    except ConfigError:
        _free_run_folder(config, trainer.state.run_name)
        raise
    finally:
        trainer.close()
    if dist.get_global_rank() == 0:
        print(table, flush=True)
    return trainer
