"""The line between a config that is refused and a bug in the user's own code."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from composer_gradmatch.forward.torch_private import raised_by_worker
from composer_gradmatch.train.config import ConfigError, one_line

__all__ = ["frames_of", "mark_as_users", "refusing", "touches_users_code"]

_OWN = str(Path(__file__).resolve().parents[1])
_STANDARD = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
# Packages of things that a config names by an entry point: installed, and yet the user's.
_users_packages: set[str] = set()


def mark_as_users(module: str) -> None:
    """Counts the package of a module as the user's own code from now on."""
    package = module.split(".")[0]
    if package not in ("composer", "composer_gradmatch", "torch"):
        _users_packages.add(package)


def frames_of(error: BaseException) -> list[FrameType]:
    """Gives the frames that an exception has passed through, the outermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def touches_users_code(error: BaseException) -> bool:
    """Tells whether an exception was raised in the user's own code, or in what that called.

    The user's own is what is neither in this package, nor in Python's library, nor installed; and what comes by an
    entry point. What a data loader's worker raises has no frames here, and counts as the user's.
    """
    if raised_by_worker(error):
        return True
    return any(map(_is_users, frames_of(error)))


def _is_users(frame: FrameType) -> bool:
    if str(frame.f_globals.get("__name__", "")).split(".")[0] in _users_packages:
        return True
    name = frame.f_code.co_filename
    if name.startswith("<"):  # Python's own frozen modules, and code that libraries generate.
        return False
    path = Path(name)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not (installed or str(path).startswith((_OWN, *_STANDARD)))


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turns what is raised inside into an error of the config; what the user's own code raises, passes.

    Args:
        where (str): The key, or the thing, that refuses, for the message.

    Raises:
        ConfigError: In the place of an exception that has not touched the user's own code; it says what that was.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if touches_users_code(error):
            raise
        raise ConfigError(f"{where}: {one_line(error)}") from error
