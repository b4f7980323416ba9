"""``--register FILE.py``: a user's file is run, for the models, data sets, rules and losses that it registers."""

from __future__ import annotations

import argparse
import atexit
import hashlib
import importlib.util
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from composer_gradmatch.algorithms.factory import algorithm_of
from composer_gradmatch.registered import KINDS, registered
from composer_gradmatch.rules.table import rule_named
from composer_gradmatch.train.config import ConfigError, nearest, one_line
from composer_gradmatch.train.refusals import mark_as_users
from composer_gradmatch.train.registry import clashes

__all__ = ["add_register", "file_contents", "load_contents", "load_files", "loaded_files", "take_register"]

#: The files that were run in this process, each with its contents.
_loaded: dict[Path, bytes] = {}
#: Files of other machines, each with its copy here.
_copies: dict[Path, Path] = {}


def add_register(parser: argparse.ArgumentParser) -> None:
    """Adds the option to a command line."""
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a Python file that adds models, data sets, rules or losses by decorator; may be given several times",
    )


def take_register(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes the option out of a command line, whose other options may be names that the files add.

    Args:
        words (Sequence[str]): The command line's words.

    Returns:
        tuple[list[str], list[str]]: The files, and the other words.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_register(parser)
    found, others = parser.parse_known_args(words)
    return found.register, others


def loaded_files() -> Mapping[Path, str]:
    """Tells which files were run, and the SHA-256 of what they held."""
    return {file: hashlib.sha256(contents).hexdigest() for file, contents in _loaded.items()}


def file_contents() -> Mapping[Path, bytes]:
    """Gives the files that were run with what they held, for :func:`load_contents` in another process."""
    return dict(_loaded)


def load_files(paths: Iterable[str | Path]) -> None:
    """Runs files that register something, each once in a process, as the modules of their names.

    Args:
        paths (Iterable[str | Path]): Python files.

    Raises:
        ConfigError: If one is not there, fails, registers nothing, or a name that is taken, or what is no rule or
            loss: one line, which begins with the file and the line.
    """
    for path in map(Path, paths):
        if path.resolve() not in _loaded:
            _load(path)


def load_contents(files: Mapping[Path, bytes]) -> None:
    """Runs files as another process has run them.

    Args:
        files (Mapping[Path, bytes]): What they held. On a machine that has no such file it is run from a copy, without
            what lies beside it.

    Raises:
        ConfigError: If a file has changed since.
    """
    for file, contents in files.items():
        here = _copies.get(file, file)
        if here not in _loaded and not here.is_file():
            here = _copies[file] = _copy(file.name, contents)
        load_files([here])
        if _loaded[here.resolve()] != contents:
            raise ConfigError(f"--register: {file} has changed since the study was started. Start it again.")


def _copy(name: str, contents: bytes) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="composer_gradmatch-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / name
    path.write_bytes(contents)
    return path


def _load(path: Path) -> None:
    before = {kind: dict(registered(kind)) for kind in KINDS}
    module, file = _module(path), path.resolve()
    contents = file.read_bytes()
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # Behind all others: for what lies beside the file, and for workers of data loaders.
    sys.modules[module.__name__] = module
    mark_as_users(module.__name__)
    try:
        assert module.__spec__ is not None
        assert module.__spec__.loader is not None
        module.__spec__.loader.exec_module(module)
        _check(path, before)
    except BaseException as error:
        del sys.modules[module.__name__]
        for kind, names in before.items():
            registered(kind).clear()
            registered(kind).update(names)
        if isinstance(error, ConfigError | KeyboardInterrupt):
            raise
        raise ConfigError(f"{path}:{_line(error, file)}: {one_line(error)}") from error
    _loaded[file] = contents


def _module(path: Path) -> ModuleType:
    """Makes the empty module of a file.

    Raises:
        ConfigError: If there is no such file, or it cannot be a module.
    """
    if not path.is_file():
        others = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = nearest(str(path), others) if others else f"There is no *.py in {path.parent}."
        raise ConfigError(f"--register: there is no file {path}: {hint}")
    name, file = path.stem, path.resolve()
    if path.suffix != ".py" or not name.isidentifier():
        raise ConfigError(f"--register: {path} must be a Python file with the name of a module, such as my_model.py.")
    other = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if other is None else other.__spec__
    if other is not None or (spec is not None and spec.origin is not None and Path(spec.origin).resolve() != file):
        raise ConfigError(f"--register: {path} has the name of another module, {name}. Give the file another name.")
    made = importlib.util.spec_from_file_location(name, file)
    assert made is not None
    return importlib.util.module_from_spec(made)


def _check(path: Path, before: Mapping[str, Mapping[str, object]]) -> None:
    """Raises if a file has registered nothing, or what cannot be used."""
    added = {
        kind: {name: each for name, each in registered(kind).items() if name not in names}
        for kind, names in before.items()
    }
    if not any(added.values()):
        raise ConfigError(
            f"{path}:1: registers nothing. Decorate its functions: from composer_gradmatch import register, then "
            "@register.model, @register.data, @register.rule or @register.loss."
        )
    for problem in clashes():
        raise ConfigError(problem)
    for name, each in added["rule"].items():
        try:
            algorithm_of(rule_named(name))
        except ValueError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(each.where) else f"{each.where}: {text}") from error
    for name, each in added["loss"].items():
        try:
            each.signature.bind(None, None)
        except TypeError as error:
            raise ConfigError(
                f"{each.where}: a loss is a function of (outputs, batch); {name} takes {each.signature}: {error}."
            ) from error


def _line(error: BaseException, file: Path) -> int:
    """Tells the line of a file that an exception comes from."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno or 1
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return (lines or [1])[-1] or 1
