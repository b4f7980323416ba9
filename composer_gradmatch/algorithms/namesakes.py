"""Several algorithms of one class in a Trainer: Composer's checkpoints have one state for each class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from composer.core import Algorithm

__all__ = ["namesakes_of", "of_each", "own_state"]

_EACH = "of_each"


def namesakes_of(algorithm: Algorithm, algorithms: Sequence[Algorithm]) -> list[Any]:
    """Lists the algorithms of a Trainer whose states have the same name in a checkpoint, if there are several."""
    name = type(algorithm).__qualname__
    alike = [each for each in algorithms if type(each).__qualname__ == name]
    return alike if len(alike) > 1 else []


def own_state(
    algorithm: Any, namesakes: Sequence[Any], state: dict[str, Any], warn: Callable[[str], None]
) -> dict[str, Any]:
    """Finds an algorithm's own state in what a checkpoint has under its name.

    Args:
        algorithm (SubsetBackprop): Whose.
        namesakes (Sequence[SubsetBackprop]): Those of its name in the Trainer, itself among them; empty for it alone.
        state (dict[str, Any]): That of one, or of several: see :func:`of_each`.
        warn (Callable): Is told if there are several, and none is its own.

    Returns:
        dict[str, Any]: The state; empty if it has none.
    """
    states, name = state.get(_EACH), state.get("log_name", algorithm.log_name)
    if states is None:
        first = next((each for each in namesakes if each.log_name == name), algorithm)
        return state if first is algorithm else {}
    alike = [each for each in namesakes if each.log_name == algorithm.log_name]
    place = next((place for place, each in enumerate(alike) if each is algorithm), 0)
    own = [each for each in states if each["log_name"] == algorithm.log_name]
    if place < len(own):
        return own[place]
    warn(f"the checkpoint has no state of an algorithm with log_name={algorithm.log_name!r}: it begins anew.")
    return {}


def of_each(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Makes one state of those of several algorithms, in their order."""
    return {**states[0], _EACH: list(states)}
