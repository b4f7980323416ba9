"""Named parts of a selection step, timed only while somebody asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["SpanRecorder", "span"]

_active: ContextVar[SpanRecorder | None] = ContextVar("composer_gradmatch_spans", default=None)


class SpanRecorder:
    """Adds up the seconds spent in each named :func:`span` while it is recording.

    Args:
        synchronize (Callable): Waits until the device has done what it was given; called at both ends of a span.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        #: Name of a span → seconds spent in it.
        self.seconds: dict[str, float] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the spans that are entered inside this context."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the time inside this context to ``seconds[name]``."""
        self.synchronize()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def span(name: str) -> Iterator[None]:
    """Marks a named part of the work; costs nothing to speak of unless a :class:`SpanRecorder` is recording."""
    recorder = _active.get()
    if recorder is None:
        yield
    else:
        with recorder.time(name):
            yield
