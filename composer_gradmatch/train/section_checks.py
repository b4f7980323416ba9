"""What is wrong with a config's sections, by the signatures and the rules of what they name."""

from __future__ import annotations

from typing import Any

from composer_gradmatch.data import NoisyLabels, validation_part
from composer_gradmatch.train.config import ConfigError, argument_problems, matches, nearest, show_type
from composer_gradmatch.train.registered_factories import loss_named, takes_loss
from composer_gradmatch.train.registry import TABLES, names_of, resolve
from composer_gradmatch.train.value_rules import ARGUMENT_RULES, LOADER_RULES, Rule, number_problems, rule_problems

__all__ = ["check_entries", "check_loader", "check_section"]

_LOADER_TYPES = {
    "shuffle": bool,
    "drop_last": bool,
    "num_workers": int,
    "pin_memory": bool,
    "prefetch_factor": int | None,
    "persistent_workers": bool,
    "timeout": float,
    "label_noise": dict | None,
    "validation": dict | None,
}


def _check_named(
    kind: str, name: str, arguments: dict[str, Any] | None, name_at: str, at: str, supplied: tuple[str, ...] = ()
) -> list[str]:
    """What is wrong with a name, found at ``name_at``, and its arguments (None: not looked at), found at ``at``."""
    try:
        factory = resolve(kind, name)
    except ConfigError as error:
        return [f"{name_at}: {error}"]
    if arguments is None:
        return []
    problems, loss = [], arguments.get("loss_fn")
    if isinstance(loss, str) and takes_loss(kind, factory):
        try:
            loss_named(loss)
        except ConfigError as error:
            problems = [f"{at}.loss_fn: {error}"]
        supplied, arguments = (*supplied, "loss_fn"), {k: v for k, v in arguments.items() if k != "loss_fn"}
    problems += argument_problems(at, factory, arguments, supplied)
    if factory is TABLES[kind][0].get(name):  # The rules are for what our tables hold, not for what others bring.
        problems += _ruled(at, arguments, ARGUMENT_RULES.get(kind, {}), problems, name)
    return problems


def _ruled(at: str, values: dict[str, Any], rules: dict[str, Rule], known: list[str], name: str = "") -> list[str]:
    """Tells what breaks the rules among the values of a section that have no problem yet."""
    wrong = {problem.split(":", 1)[0] for problem in known}
    finite = {key: value for key, value in values.items() if not number_problems(f"{at}.{key}", value)}
    fitting = {key: value for key, value in finite.items() if f"{at}.{key}" not in wrong}
    return rule_problems(at, fitting, rules, name)


def _without_name(kind: str, where: str, section: Any) -> list[str]:
    if isinstance(section, dict) and isinstance(section.get("name"), str):
        return []
    return [f"{where}: expected a mapping with a name, got {section!r}. {nearest('', names_of(kind))}"]


def check_section(kind: str, where: str, section: Any, supplied: tuple[str, ...] = ()) -> list[str]:
    """Tells what is wrong with a section ``{name: ..., arguments ...}``: a message for each problem."""
    if problems := _without_name(kind, where, section):
        return problems
    arguments = {key: value for key, value in section.items() if key != "name"}
    return _check_named(kind, section["name"], arguments, f"{where}.name", where, supplied)


def check_loader(where: str, section: Any) -> list[str]:
    """Tells what is wrong with a loader's section: a message for each problem."""
    problems = _without_name("data set", where, section)
    if not isinstance(section, dict):
        return problems
    dataset = section.get("dataset")
    if dataset is None:
        dataset = {}
    if not isinstance(dataset, dict):
        return [f"{where}.dataset: expected a mapping, got {dataset!r}."]
    if not problems:
        problems = _check_named("data set", section["name"], dataset, f"{where}.name", f"{where}.dataset")
    for key, value in section.items():
        if key in ("name", "dataset"):
            continue
        if key not in _LOADER_TYPES:
            problems.append(f"{where}.{key}: unknown key; {nearest(key, ['name', 'dataset', *_LOADER_TYPES])}")
        elif not matches(value, _LOADER_TYPES[key]):
            problems.append(f"{where}.{key}: expected {show_type(_LOADER_TYPES[key])}, got {value!r}.")
        elif key == "label_noise" and value is not None:
            problems += argument_problems(f"{where}.label_noise", NoisyLabels, value, supplied=("dataset",))
        elif key == "validation" and value is not None:
            problems += argument_problems(f"{where}.validation", validation_part, value, supplied=("dataset",))
    problems += _ruled(where, section, LOADER_RULES, problems)
    if not problems and not section.get("num_workers"):
        problems = [
            f"{where}.{key}: expected num_workers of at least 1 beside it; got {section[key]!r} without workers."
            for key in ("persistent_workers", "prefetch_factor", "timeout")
            if section.get(key) and not number_problems(key, section[key])
        ]
    return problems


def check_entries(kind: str, where: str, entries: Any) -> list[str]:
    """Tells what is wrong with a section of ``name: {arguments}`` entries: a message for each problem."""
    if entries is None or entries is False:
        return []
    if not isinstance(entries, dict):
        return [f"{where}: expected a mapping of names to arguments, got {entries!r}."]
    problems = []
    for name, arguments in entries.items():
        at = f"{where}.{name}"
        if not (arguments is None or arguments is False or isinstance(arguments, dict)):
            problems.append(f"{at}: expected a mapping of arguments, nothing or false, got {arguments!r}.")
        else:
            problems += _check_named(kind, str(name), None if arguments is False else arguments or {}, at, at)
    return problems
