"""What a config may hold, checked as a whole before anything is built."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Time
from composer.utils import ParallelismConfig
from composer.utils.file_helpers import format_name_with_dist

from composer_gradmatch.train.config import ConfigError, argument_problems, matches, nearest, show_type
from composer_gradmatch.train.refusals import refusing
from composer_gradmatch.train.registry import clashes
from composer_gradmatch.train.section_checks import check_entries, check_loader, check_section
from composer_gradmatch.train.value_rules import TRAINER_RULES, number_problems, overwriting_problem, rule_problems

__all__ = ["TRAINER_KEYS", "check_config"]

#: Keyword arguments of Composer's Trainer that a config may hold, as they are.
TRAINER_KEYS = (
    "accumulate_train_batch_on_tokens",
    "autoresume",
    "compile_config",
    "console_log_interval",
    "ddp_sync_strategy",
    "deterministic_mode",
    "device",
    "device_train_microbatch_size",
    "dist_timeout",
    "eval_interval",
    "eval_subset_num_batches",
    "load_exclude_algorithms",
    "load_ignore_keys",
    "load_path",
    "load_strict_model_weights",
    "load_weights_only",
    "log_to_console",
    "max_duration",
    "parallelism_config",
    "precision",
    "precision_config",
    "progress_bar",
    "python_log_level",
    "run_name",
    "save_filename",
    "save_interval",
    "save_num_checkpoints_to_keep",
    "save_overwrite",
    "save_weights_only",
    "scale_schedule_ratio",
    "seed",
    "step_schedulers_every_batch",
    "train_subset_num_batches",
)
_OWN_TYPES: dict[str, Any] = {
    "global_train_batch_size": int,
    "device_eval_batch_size": int,
    "variables": dict,
    "save_folder": str | None,
}
_SECTIONS = ("model", "train_loader", "eval_loader", "optimizer", "scheduler", "algorithms", "callbacks", "loggers")
_REQUIRED = ("model", "train_loader", "optimizer", "max_duration", "global_train_batch_size")


def check_config(config: dict[str, Any]) -> None:
    """Checks every key, name, argument, type and value of a config before anything is built.

    Args:
        config (dict[str, Any]): As :func:`.load_config` returns it.

    Raises:
        ConfigError: With all problems, one a line.
    """
    problems = clashes()
    problems += [f"{key}: missing." for key in _REQUIRED if config.get(key) is None]
    problems += number_problems("", {key: value for key, value in config.items() if key != "variables"})
    problems += _top_level_problems(config, problems)
    for key in ("model", "optimizer", "scheduler"):
        if not _is_off(config, key):
            supplied = ("params",) if key == "optimizer" else ()
            problems += check_section(key, key, config[key], supplied=supplied)
    for key in ("train_loader", "eval_loader"):
        if not _is_off(config, key):
            problems += check_loader(key, config[key])
    for kind in ("algorithm", "callback", "logger"):
        problems += check_entries(kind, f"{kind}s", config.get(f"{kind}s"))
    # What takes several values together can be looked at once each of them is right.
    problems = problems or _combined_problems(config)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _is_off(config: dict[str, Any], key: str) -> bool:
    """Tells whether a section is absent, null or, where a run needs none, switched off by ``false``."""
    return config.get(key) is None or (key not in _REQUIRED and config[key] is False)


def _top_level_problems(config: dict[str, Any], known: list[str]) -> list[str]:
    """Tells what is wrong with the keys that are no sections, apart from what is known to be."""
    hints = typing.get_type_hints(Trainer.__init__)
    types = {**{key: hints[key] for key in TRAINER_KEYS}, **_OWN_TYPES}
    wrong = {problem.split(":", 1)[0] for problem in known}
    problems, fitting = [], {}
    for key, value in config.items():
        if key in _SECTIONS or key in wrong:
            continue
        if key not in types:
            problems.append(f"{key}: unknown key; {nearest(key, [*types, *_SECTIONS])}")
        elif key == "save_folder" and value is False:
            continue
        elif not matches(value, types[key]):
            problems.append(f"{key}: got {value!r} ({type(value).__name__}), expected {show_type(types[key])}.")
        else:
            fitting[key] = value
    return problems + rule_problems("", fitting, TRAINER_RULES)


def _combined_problems(config: dict[str, Any]) -> list[str]:
    """Tells what is wrong with values of a checked config that are right one by one."""
    return [
        *_device_problems(config),
        *_duration_problems(config),
        *_checkpoint_problems(config),
        *_compile_problems(config),
    ]


def _device_problems(config: dict[str, Any]) -> list[str]:
    asked = (config.get("device") or ("gpu" if torch.cuda.is_available() else "cpu")).lower()
    available = {"gpu": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if asked in available and not available[asked]():
        return [f"device: this machine has no {asked} that torch could use; got {asked!r}. Try device=cpu."]
    problems = []
    precision = config.get("precision") or "fp32"
    if asked == "cpu" and precision.lower() != "fp32":
        problems.append(f"precision: {precision!r} is not supported for CPU training. Expected fp32.")
    if config.get("precision_config") and precision.lower() != "amp_fp8":
        problems.append(f"precision_config: only precision=amp_fp8 has one; the precision is {precision!r}.")
    kinds = [each.name for each in dataclasses.fields(ParallelismConfig)]
    parallel = config.get("parallelism_config")
    unknown = [key for key in parallel or {} if key not in kinds]
    problems += [f"parallelism_config.{key}: unknown key; {nearest(key, kinds)}" for key in unknown]
    if asked == "cpu" and parallel is not None and not unknown:
        problems.append("parallelism_config: Composer shards models on accelerators only, and the device is 'cpu'.")
    if asked != "gpu" and config.get("device_train_microbatch_size") == "auto":
        problems.append(
            f"device_train_microbatch_size: 'auto' needs a GPU, and the device is {asked!r}. Give a number."
        )
    return problems


def _duration_problems(config: dict[str, Any]) -> list[str]:
    ratio = config.get("scale_schedule_ratio")
    if ratio is None or ratio == 1:
        return []
    if _is_off(config, "scheduler"):
        return [f"scale_schedule_ratio: expected a scheduler beside it, which it scales; got {ratio} and no scheduler."]
    duration = Time.from_input(config["max_duration"], "ep").value
    scaled = duration * ratio
    if not math.isfinite(scaled) or int(scaled) < 1:
        return [f"scale_schedule_ratio: {ratio} scales max_duration={config['max_duration']!r} to {scaled:g}."]
    return []


def _checkpoint_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    saves = config.get("save_folder", "runs/{run_name}") not in (None, False)
    if config.get("autoresume") and not saves:
        problems.append("autoresume: expected a save_folder, which has the run to resume; it is switched off.")
    path = config.get("load_path")
    # With autoresume it is looked for only where the run has no checkpoint of its own.
    if path is not None and "://" not in path and not config.get("autoresume"):
        file = format_name_with_dist(path, config.get("run_name") or "run")
        if not Path(file).exists():
            problems.append(f"load_path: expected a checkpoint that Composer has saved; there is no file {file}.")
    keeps_all = config.get("save_overwrite") and config.get("save_num_checkpoints_to_keep", -1) == -1
    name = config.get("save_filename")
    if saves and name is not None and not keeps_all:
        problem = overwriting_problem(name, config.get("save_interval", "1ep"))
        problems += [] if problem is None else [problem]
    return problems


def _compile_problems(config: dict[str, Any]) -> list[str]:
    arguments = config.get("compile_config")
    if arguments is None:
        return []
    problems = argument_problems("compile_config", torch.compile, arguments, supplied=("model",))
    if not problems:
        with refusing("compile_config"):
            torch.compile(torch.nn.Identity(), **arguments)
    return problems
