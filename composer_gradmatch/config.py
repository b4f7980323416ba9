"""Reading a YAML config with overrides, and checking names, values and arguments before any work starts."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["ConfigError", "argument_problems", "load_config", "matches", "nearest", "show_type"]


class ConfigError(ValueError):
    """A config that cannot be run; the message lists every problem found, one a line."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Ends an error message with the valid name that is most like a wrong one, and all valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Valid: {', '.join(valid)}."


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Reads a YAML file, applies ``key.sub=value`` overrides and resolves interpolations.

    Args:
        path (str | Path): The YAML file.
        overrides (Iterable[str], optional): OmegaConf's dotlist; values are YAML. Default: ``()``.

    Returns:
        dict[str, Any]: Plain Python data.

    Raises:
        ConfigError: If the file is missing or no YAML mapping, or an override cannot be read.
    """
    path, overrides = Path(path), list(overrides)
    if not path.is_file():
        found = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(str(path), found) if found else f"There is no *.yaml in {path.parent}."
        raise ConfigError(f"There is no config file {path}: {hint}")
    wrong = [override for override in overrides if "=" not in override or override.startswith("=")]
    if wrong:
        raise ConfigError(f"Overrides have the form key.sub=value; got {', '.join(map(repr, wrong))}.")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        config = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"Cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got a {type(config).__name__}.")
    return {str(key): value for key, value in config.items()}


def argument_problems(
    where: str, factory: Callable[..., Any], arguments: dict[str, Any], supplied: Iterable[str] = ()
) -> list[str]:
    """What is wrong with the arguments of a factory, by its own signature.

    Args:
        where (str): The dotted key of the section, for the messages.
        factory (Callable): A class or function.
        arguments (dict[str, Any]): Its keyword arguments from the config.
        supplied (Iterable[str], optional): Parameters that are given to it by us. Default: ``()``.

    Returns:
        list[str]: A message for each problem.
    """
    signature = inspect.signature(factory)
    supplied = set(supplied)
    named = {
        name: p
        for name, p in signature.parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in supplied
    }
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    hints = _hints(factory)
    problems = []
    for key, value in arguments.items():
        if key not in named:
            if not open_ended:
                problems.append(f"{where}.{key}: unknown key; {nearest(key, named)}")
        elif not matches(value, hint := hints.get(key, Any)):
            problems.append(f"{where}.{key}: expected {show_type(hint)}, got {value!r} ({type(value).__name__}).")
    problems += [
        f"{where}.{name}: missing; it has no default."
        for name, p in named.items()
        if p.default is p.empty and name not in arguments
    ]
    return problems


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    function = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        # Names that exist for type checkers only: such a signature still tells the valid keys.
        return {}


def matches(value: Any, hint: Any) -> bool:
    """Whether a YAML value fits a type annotation; annotations that YAML cannot express accept anything.

    An int is a float, but a bool is neither.
    """
    if hint in (Any, inspect.Parameter.empty) or isinstance(hint, str | typing.TypeVar):
        return True
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(matches(value, part) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    kind = origin or hint
    if kind in (list, tuple, set, frozenset):
        if not isinstance(value, list):
            return False
        inner = [part for part in parts if part is not Ellipsis]
        if kind is tuple and inner and Ellipsis not in parts:
            return len(inner) == len(value) and all(map(matches, value, inner))
        return not inner or all(matches(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict)
    if inspect.isclass(kind) and kind.__module__ not in ("typing", "collections.abc", "builtins"):
        # Of Python's own classes YAML can only express the members of an Enum.
        return isinstance(value, kind) or (issubclass(kind, Enum) and isinstance(value, str))
    return True


def show_type(hint: Any) -> str:
    """A type annotation, for an error message."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(show_type(part) for part in parts)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, parts))
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
