"""Which values a config may hold beside their types: ranges, times, names of files and units."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from string import Formatter
from typing import Any, NamedTuple

from composer.core import Time, Timestamp
from composer.utils.file_helpers import format_name_with_dist_and_time

from composer_gradmatch.train.config import parse_time

__all__ = [
    "ARGUMENT_RULES",
    "LOADER_RULES",
    "TRAINER_RULES",
    "Rule",
    "number_problems",
    "overwriting_problem",
    "rule_problems",
]

_INT64 = 2**63
#: More worker processes than this for a loader are a slip of the keyboard on any machine of today.
_MOST_WORKERS = max(64, 4 * (os.cpu_count() or 1))


class Rule(NamedTuple):
    """What a value of the right type must be.

    Attributes:
        holds (Callable): Whether a value is.
        expected (str): The same in words, for the error message.
    """

    holds: Callable[[Any], bool]
    expected: str


def _at_least(least: float, *others: Any) -> Rule:
    words = "".join(f" or {other!r}" for other in others)
    return Rule(lambda value: value in others or value >= least, f"at least {least}{words}")


def _between(least: float, most: float) -> Rule:
    return Rule(lambda value: least <= value <= most, f"from {least:,} to {most:,}")


def _one_of(*names: Any) -> Rule:
    return Rule(lambda value: value in names, f"one of {', '.join(map(str, names))}")


def _time(*units: str, zero: bool = False) -> Rule:
    """Gives a time in one of some units, or a plain number (which the type admits or not) of at least 1."""

    def holds(value: Any) -> bool:
        if not isinstance(value, str):
            return value >= (0 if zero else 1)
        time = parse_time(value)
        if time is None or time.unit.value not in units:
            return False
        if time.unit.value == "dur":
            return 0 < time.value <= 1
        return time.value > 0 or zero

    example = "10ep" if "ep" in units else f"10{units[0]}"
    limits = [f"{'0' if zero else '1'} or more", *(["a dur of 0 to 1, 0 excluded"] if "dur" in units else [])]
    return Rule(holds, f"a time such as {example!r}, in {', '.join(units)} ({', '.join(limits)})")


_IN_FOLDERS = {"run_name", "rank", "local_rank", "world_size", "local_world_size", "node_rank"}
_TIMES = ("epoch", "batch", "sample", "token", "batch_in_epoch", "sample_in_epoch", "token_in_epoch")
_IN_FILES = {*_IN_FOLDERS, *_TIMES}


def _has_only(template: str, placeholders: set[str]) -> bool:
    """Whether a template has no placeholders but some, each by its bare name: Composer fills them in in two goes."""
    try:
        fields = [field for _, *field in Formatter().parse(template) if field[0] is not None]
    except ValueError:
        return False
    doubled = "{{" in template or "}}" in template
    return not doubled and all(name in placeholders and not spec and not how for name, spec, how in fields)


def _is_folder(template: str) -> bool:
    # A URI would be taken for a local folder of that name: what is written there is not sent on.
    local = bool(template.strip()) and "\0" not in template and "://" not in template
    return local and _has_only(template, _IN_FOLDERS)


def _is_file(template: str) -> bool:
    ends_well = os.path.basename(template).strip() not in ("", ".", "..")
    return ends_well and "\0" not in template and _has_only(template, _IN_FILES) and _is_pattern(template)


def _is_pattern(template: str) -> bool:
    """Tells whether Composer, which looks for earlier checkpoints by a pattern made of the name, can make one."""
    for name in _TIMES:
        template = template.replace(f"{{{name}}}", f"(?P<{name}>\\d+)")
    try:
        re.compile(template)
    except re.error:
        return False
    return True


def _is_timeout(seconds: float) -> bool:
    try:
        return timedelta(seconds=seconds) > timedelta(0)
    except OverflowError:
        return False


_positive = Rule(lambda value: value > 0, "a number above 0")
_not_negative = Rule(lambda value: value >= 0, "a number of at least 0")
_fraction = _between(0, 1)
_count = _between(1, 2**31 - 1)
_batches = Rule(lambda value: value == -1 or value >= 1, "at least 1, or -1 for all")
_span = _time("ep", "ba", "sp", "tok", "dur")
_delay = _time("ep", "ba", "sp", "tok", "dur", zero=True)
_repeat = _time("ep", "ba", "sp", "tok", "dur", "sec", zero=True)
# Beyond, a learning rate that is their product overflows float32.
_rate = _between(0, 10**6)
_classes = Rule(lambda value: 2 <= value <= 10**6, "the number of classes, from 2 to 1,000,000")
_width = _between(1, 2**16)
_nonempty = Rule(lambda value: bool(value.strip()) and "\0" not in value, "a name that is not empty")
_template = Rule(
    _is_folder,
    "a local name that is not empty, with no placeholders but {run_name}, {rank}, {local_rank}, {world_size}, ...",
)

TRAINER_RULES: dict[str, Rule] = {
    "console_log_interval": _time("ep", "ba"),
    "dist_timeout": Rule(_is_timeout, "seconds, above 0 and below 10^14"),
    "device": Rule(lambda value: value.lower() in ("cpu", "gpu", "mps", "tpu", "hpu"), "cpu, gpu, mps, tpu or hpu"),
    "device_eval_batch_size": _count,
    "device_train_microbatch_size": Rule(
        lambda value: value == "auto" or (isinstance(value, int) and value >= 1),
        "a whole number of at least 1, or 'auto' on a GPU",
    ),
    "eval_interval": _repeat,
    "eval_subset_num_batches": _batches,
    "global_train_batch_size": _count,
    "load_path": _nonempty,
    "max_duration": _time("ep", "ba", "sp", "tok"),
    "python_log_level": Rule(
        lambda value: isinstance(logging.getLevelName(value.upper()), int), "DEBUG, INFO, WARNING, ERROR or CRITICAL"
    ),
    "run_name": Rule(
        lambda value: _nonempty.holds(value) and not set(value) & set("{}"), "a name that is not empty, without braces"
    ),
    "save_filename": Rule(
        _is_file,
        "the name of a file, with no placeholders but {rank}, {epoch}, {batch}, {sample}, {token} and Composer's "
        "others",
    ),
    "save_folder": _template,
    "save_interval": _repeat,
    "save_num_checkpoints_to_keep": _at_least(-1),
    "scale_schedule_ratio": Rule(lambda value: 0 < value <= 10**6, "above 0 and at most 1,000,000"),
    "seed": _between(0, 2**32 - 1),
    "train_subset_num_batches": _batches,
}

LOADER_RULES: dict[str, Rule] = {
    "num_workers": _between(0, _MOST_WORKERS),
    "prefetch_factor": _between(1, 10_000),
    "timeout": _not_negative,
}

#: Kind of thing → argument, or name.argument for one thing's own → rule; what is not here, its constructor judges.
ARGUMENT_RULES: dict[str, dict[str, Rule]] = {
    "algorithm": {
        "alibi.max_sequence_length": _at_least(1),
        "alibi.train_sequence_length_scaling": Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
        "alpha": _positive,
        "anneal_steps": _at_least(1),
        "anneal_strategy": _one_of("linear", "cos"),
        "augmentation_set": _one_of("all", "safe", "original"),
        "augmix.depth": _at_least(1, -1),
        "augmix.severity": _between(0, 10),
        "clipping_threshold": _positive,
        "clipping_type": _one_of("norm", "value", "adaptive"),
        "delay_fraction": _fraction,
        "depth": _at_least(0),
        "drop_distribution": _one_of("uniform", "linear"),
        "drop_rate": _fraction,
        "drop_warmup": _delay,
        "duration": _fraction,
        "ema_start": _delay,
        "epsilon": _not_negative,
        "finetune_fraction": _fraction,
        "freeze_level": _fraction,
        "freeze_start": _fraction,
        "ghost_batch_size": _at_least(1),
        "half_life": _span,
        "initial_scale": Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
        "interval": _at_least(1),
        "latent_channels": _positive,
        "latent_features": _positive,
        "length": _fraction,
        "max_seq_length": _at_least(1),
        "min_channels": _at_least(1),
        "min_features": _at_least(1),
        "min_seq_length": _at_least(1),
        "mode": _one_of("resize", "crop"),
        "n_last_layers_ignore": _at_least(0),
        "num_holes": _between(0, 10_000),
        "p": Rule(lambda value: 0 <= value < 1, "at least 0 and below 1"),
        "p_col": Rule(lambda value: 0 <= value < 1, "at least 0 and below 1"),
        "p_row": Rule(lambda value: 0 <= value < 1, "at least 0 and below 1"),
        "rho": _not_negative,
        "severity": _between(0, 30),
        "sigma": _at_least(1),
        "size_increment": _at_least(1),
        "smoothing": _fraction,
        "step_size": _at_least(1),
        "stochastic_method": _one_of("block", "sample"),
        "swa_end": _time("ep", "ba", "sp", "tok", "dur"),
        "swa_lr": _rate,
        "swa_start": _delay,
        "tau": _at_least(1),
        "update_interval": _span,
        "width": _at_least(1),
    },
    "callback": {
        "batch_log_interval": _at_least(1),
        "dataloader_label": _one_of("train", "eval"),
        "dist_aggregate_batch_interval": _at_least(1),
        "filename": _nonempty,
        "folder": _template,
        "gpu_flops_available": _positive,
        "interval": _time("ep", "ba", "sp", "tok", "dur"),
        "max_entries": _at_least(1),
        "min_delta": _not_negative,
        "patience": _time("ep", "ba", "sp", "tok", "dur", zero=True),
        "skip_batches": _at_least(0),
        "time_unit": _one_of("seconds", "minutes", "hours", "days"),
        "window_size": _between(1, 10**9),
    },
    "data set": {
        "max_length": _at_least(1),
        "num_classes": _classes,
        "num_samples": _between(1, 10**9),
        "root": _nonempty,
        "seed": _between(0, 2**62),
    },
    "logger": {
        "buffer_size": _at_least(1),
        "filename": _template,
        "flush_interval": _at_least(1),
        "log_duplicated_metric_every_n_steps": _at_least(1),
        "log_interval": _time("ep", "ba"),
        "logging_buffer_seconds": _at_least(0),
        "max_logs_per_message": _at_least(1),
    },
    "model": {"depth": _between(1, 10**4), "num_classes": _classes, "num_labels": _classes, "width": _width},
    "optimizer": {"dampening": _not_negative, "eps": _not_negative, "lr": _rate, "weight_decay": _not_negative},
    "scheduler": {
        "alpha": _rate,
        "alpha_f": _rate,
        "alpha_i": _rate,
        "decay_period": _span,
        "gamma": _rate,
        "milestones": Rule(lambda value: all(map(_delay.holds, value)), f"a list of times, each {_delay.expected}"),
        "power": _not_negative,
        "step_size": _span,
        "t_0": _span,
        "t_max": _span,
        "t_mult": _at_least(1),
        "t_warmup": _delay,
    },
}


def rule_problems(where: str, values: dict[str, Any], rules: dict[str, Rule], name: str = "") -> list[str]:
    """Tells what breaks the rules: a message for each value.

    Args:
        where (str): The dotted key of the section, for the messages; ``""`` for the config's top.
        values (dict[str, Any]): Values whose types are right.
        rules (dict[str, Rule]): For some of the keys.
        name (str, optional): What the section describes, for rules that are its alone. Default: ``""``.
    """
    problems = []
    for key, value in values.items():
        rule = rules.get(f"{name}.{key}") or rules.get(key)
        if rule is not None and value is not None and not rule.holds(value):
            at = f"{where}.{key}" if where else key
            problems.append(f"{at}: expected {rule.expected}; got {value!r}.")
    return problems


def number_problems(where: str, value: Any) -> list[str]:
    """Gives the numbers, at any depth of a value, that are not finite, or integers that no library could hold."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        items = ()
        if isinstance(value, float) and not math.isfinite(value):
            return [f"{where}: expected a finite number; got {value!r}."]
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            return [f"{where}: expected a number between -2^63 and 2^63; got one of {value.bit_length()} bits."]
    return [
        problem for key, item in items for problem in number_problems(f"{where}.{key}" if where else str(key), item)
    ]


def overwriting_problem(filename: str, interval: Any) -> str | None:
    """Tells what is wrong with a checkpoint's name that two saves of a run would share; None if there are none.

    Args:
        filename (str): A template that :data:`TRAINER_RULES` accepts.
        interval (int | str): The checked ``save_interval``.
    """
    unit = Time.from_input(interval, "ep").unit.value
    # Within an epoch only what counts within epochs tells two saves apart; at the ends of epochs, only what does not.
    moments = [(1, 10, 0), (2, 20, 0)] if unit == "ep" else [(0, 10, 10), (0, 20, 20), (1, 40, 10)]
    names = {
        format_name_with_dist_and_time(
            filename,
            "run",
            Timestamp(
                epoch=epoch,
                batch=batch,
                sample=8 * batch,
                token=64 * batch,
                batch_in_epoch=in_epoch,
                sample_in_epoch=8 * in_epoch,
                token_in_epoch=64 * in_epoch,
                total_wct=timedelta(seconds=batch),
                epoch_wct=timedelta(seconds=in_epoch),
                batch_wct=timedelta(seconds=1),
            ),
        )
        for epoch, batch, in_epoch in moments
    }
    if len(names) == len(moments):
        return None
    return (
        f"save_filename: expected a name that differs between checkpoints saved every {interval}; got {filename!r}, "
        "with which a later one would overwrite an earlier one. Put {epoch} and {batch} into it, as in "
        "'ep{epoch}-ba{batch}-rank{rank}.pt'."
    )
