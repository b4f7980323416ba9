"""Capturing without what torch says of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from composer_gradmatch.forward.torch_private import CAPTURE_LOGGERS, symbolic_convert

__all__ = ["quietly"]

_TALKATIVE = [logging.getLogger(name) for name in CAPTURE_LOGGERS]
_IGNORE_WARNINGS: Any = ("ignore", None, Warning, None, 0)


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps torch from saying on stderr, or in warnings, what happens while it captures.

    Not by ``warnings.catch_warnings``, after which Python shows again what it has shown once; nor by the levels of
    loggers, which each change makes all loggers find out anew.
    """
    quiet = [logger for logger in _TALKATIVE if not logger.disabled]
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    filters.insert(0, _IGNORE_WARNINGS)
    # It prints the graph where the number that decides on a branch is a tensor's.
    setattr(symbolic_convert, "print", lambda *_, **__: None)  # noqa: B010
    for logger in quiet:
        logger.disabled = True
    try:
        yield
    finally:
        filters.remove(_IGNORE_WARNINGS)
        delattr(symbolic_convert, "print")
        for logger in quiet:
            logger.disabled = False
