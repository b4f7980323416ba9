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
from composer.core import Time
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = [
    "ConfigError",
    "argument_problems",
    "hints_of",
    "load_config",
    "matches",
    "nearest",
    "one_line",
    "parse_time",
    "show_type",
    "with_overrides",
]


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
    path = Path(path)
    if not path.is_file():
        found = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(str(path), found) if found else f"There is no *.yaml in {path.parent}."
        raise ConfigError(f"There is no config file {path}: {hint}")
    merged = with_overrides(_read(path), overrides)
    try:
        config = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except _UNREADABLE as error:
        raise ConfigError(f"Cannot read {path}: {one_line(error)}") from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def with_overrides(config: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Applies ``key.sub=value`` overrides.

    Raises:
        ConfigError: If one cannot be read.
    """
    overrides = list(overrides)
    wrong = [override for override in overrides if "=" not in override or override.startswith("=")]
    if wrong:
        raise ConfigError(f"Overrides have the form key.sub=value; got {', '.join(map(repr, wrong))}.")
    merged: Any = config
    for override in overrides:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except _UNREADABLE as error:
            raise ConfigError(
                f"{override.split('=')[0]}: cannot override it with {override!r}: {one_line(error)}"
            ) from error
    return merged


# What YAML's and OmegaConf's own code raises on what a file or an override may hold.
_UNREADABLE = (
    yaml.YAMLError,
    OmegaConfBaseException,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    OSError,
    RecursionError,
)


def _read(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except RecursionError as error:
        raise ConfigError(f"Cannot read {path}: it is nested too deeply.") from error
    except OSError as error:
        # OmegaConf's for a file that holds a single value, and the file system's own.
        raise ConfigError(f"{path} must hold a mapping of keys to values: {one_line(error)}") from error
    except _UNREADABLE as error:
        raise ConfigError(f"Cannot read {path}: {one_line(error)}") from error
    if not isinstance(loaded, DictConfig) or loaded._is_none():
        raise ConfigError(f"{path} must hold a mapping of keys to values, got a {type(loaded).__name__}.")
    return loaded


def one_line(error: BaseException) -> str:
    """Gives an exception's type and message on one line."""
    # Python's KeyError shows its message in quotes, an AssertionError often none.
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def parse_time(text: str) -> Time | None:
    """Reads a time string such as ``"10ep"`` as Composer does; None if it is none, or negative."""
    if not text.strip():
        return None  # Composer reads no time as 0 seconds.
    try:
        time = Time.from_timestring(text)
    except (ValueError, TypeError, OverflowError, AssertionError, AttributeError):
        return None
    return time if time.value >= 0 else None  # Not of nan, which Composer reads.


def argument_problems(
    where: str, factory: Callable[..., Any], arguments: dict[str, Any], supplied: Iterable[str] = ()
) -> list[str]:
    """Tells what is wrong with the arguments of a factory, by its own signature.

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
    kinds = {p.kind for p in signature.parameters.values()}
    # A base class that takes any positional arguments too takes none of them to heart.
    open_ended = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
    hints = hints_of(factory)
    problems = []
    for key, value in arguments.items():
        if key not in named:
            if not open_ended:
                hint = nearest(key, named) if named else "It takes no arguments."
                problems.append(f"{where}.{key}: unknown key; {hint}")
        elif not matches(value, hint := hints.get(key, Any)):
            problems.append(f"{where}.{key}: expected {show_type(hint)}, got {value!r} ({type(value).__name__}).")
    problems += [
        f"{where}.{name}: missing; it has no default."
        for name, p in named.items()
        if p.default is p.empty and name not in arguments
    ]
    return problems


def hints_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """Gives the types of a function's or a class's parameters, as far as they can be told."""
    function = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        # Names that exist for type checkers only: such a signature still tells the valid keys.
        return {}


def matches(value: Any, hint: Any) -> bool:
    """Tells whether a YAML value fits a type annotation; annotations that YAML cannot express accept anything.

    An int is a float, but a bool is neither.
    """
    if hint in (Any, inspect.Parameter.empty) or isinstance(hint, str | typing.TypeVar):
        return True
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if isinstance(value, str) and any(map(_is_named, parts)):
            # Where a string stands for a time or a member of an Enum, it must be one.
            parts = tuple(part for part in parts if part is not str)
        return any(matches(value, part) for part in parts)
    if _is_named(hint):
        return _names(value, hint)
    if (origin or hint) is Callable:
        return False  # YAML cannot express one.
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
        return isinstance(value, kind)
    return True


def _is_named(hint: Any) -> bool:
    """Tells whether a class is one of those whose objects YAML can name: times and the members of an Enum."""
    kind = typing.get_origin(hint) or hint
    return inspect.isclass(kind) and issubclass(kind, Time | Enum)


def _names(value: Any, hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    if isinstance(value, kind) or not isinstance(value, str):
        return isinstance(value, kind)
    if issubclass(kind, Time):
        return parse_time(value) is not None
    try:
        kind(value)
    except ValueError:
        return False
    return True


def show_type(hint: Any) -> str:
    """Gives a type annotation, for an error message."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        if any(map(_is_named, parts)):
            parts = tuple(part for part in parts if part is not str)
        shown = dict.fromkeys(show_type(part) for part in parts if (typing.get_origin(part) or part) is not Callable)
        return " or ".join(shown)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, parts))
    if _is_named(hint):
        kind = typing.get_origin(hint) or hint
        if issubclass(kind, Time):
            return "a time such as '10ep'"
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if typing.get_origin(hint) is list and parts:
        return f"a list, each {show_type(parts[0])}"
    if typing.get_origin(hint) is tuple and parts and Ellipsis not in parts:
        return f"a list of {len(parts)}: {', '.join(map(show_type, parts))}"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
