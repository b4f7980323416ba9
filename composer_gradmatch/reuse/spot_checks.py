"""When a captured pass is compared with the model's own, between its verifications."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["SHARE", "SpotChecks"]

#: The share of training's time that each kind of check may take.
SHARE = 0.0025


class SpotChecks:
    """Draws the steps of a check: the first few, and then such that it costs a share of training.

    A check is due with the probability share·T/t, T the mean time of a step and t that of a check, as measured: each
    step while a check costs less than the share of one. No schedule of a user's can be between them, as they are drawn,
    from the number of the step and from no generator that anything else draws from.

    Args:
        share (float): Of the time of training.
        first (int, optional): How many steps, the first, are checked in any case. Default: ``10``.
        guess (float, optional): What a check costs, in steps, as long as none was measured. Default: ``1.0``.
    """

    def __init__(self, share: float, first: int = 10, guess: float = 1.0) -> None:
        self._share, self._first, self._guess = share, first, guess
        self._steps, self._checks = 0, 0
        self._started: float | None = None
        self._spent = 0.0

    def due(self) -> bool:
        """Tells whether to check in this step, asked once in each."""
        now = time.perf_counter()
        # The first step's time is that of the capture.
        if self._steps == 1:
            self._started = now
        self._steps += 1
        if self._steps <= self._first:
            return True
        if self._started is None or self._steps < 3:
            return False
        step = (now - self._started - self._spent) / (self._steps - 2)
        cost = self._spent / (self._checks - 1) if self._checks > 1 else self._guess * step
        return random.Random(self._steps).random() * cost < self._share * step

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measures a check inside the context."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._checks += 1
            if self._checks > 1:  # What is done for the first time takes longer.
                self._spent += time.perf_counter() - started
