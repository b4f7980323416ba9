"""The Trainer whose step is under way, since Composer has no event for a step that an error or an interrupt ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from composer import Trainer

from composer_gradmatch.forward.composer_private import check_step, step_of, unwrap_step, wrap_step

__all__ = ["put_around_step", "trainer_on_the_stack"]

check_step()


def trainer_on_the_stack() -> Trainer | None:
    """Gives the Trainer whose ``fit`` has called this, if one has."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is Trainer.fit.__code__:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def put_around_step(
    trainer: Trainer, is_due: Callable[[], bool], enter: Callable[[], None], leave: Callable[[], None]
) -> None:
    """Calls a function before the next step of a Trainer in which that is due, and another however the step ends.

    Args:
        trainer (Trainer): The Trainer. What was put around its step before is no longer there.
        is_due (Callable): Asked at the beginning of each step, until one is found to be due.
        enter (Callable): Called before that step.
        leave (Callable): Called after it, when the Trainer makes steps in its own way again.
    """
    unwrap_step(trainer)
    make_step = step_of(trainer)

    def step(*args: Any, **kwargs: Any) -> Any:
        if not is_due():
            return make_step(*args, **kwargs)
        try:
            enter()
            return make_step(*args, **kwargs)
        finally:
            unwrap_step(trainer)
            leave()

    wrap_step(trainer, step)
