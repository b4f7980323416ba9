"""An algorithm is copied and pickled as a new one of the same arguments and state; a run's hooks are not its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from composer.core import Algorithm

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CopiedByArguments"]


class CopiedByArguments(Algorithm):
    """Remembers what it was made of.

    A copy is made of the same arguments, by ``copy.deepcopy`` of copies of them, but for a module given as the output
    layer, which is the model's. It has the state that a checkpoint would have of this process, its schedule as it is
    now, and nothing of the Trainer.
    """

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    #: What of its arguments can be changed later on.
    _schedule: ClassVar[tuple[str, ...]] = ("start", "end", "keep", "interrupt", "clock")

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Makes an algorithm, whatever its class takes."""
        made = super().__new__(cls)
        made._arguments = args, kwargs
        return made

    def _own_state(self, of_all_ranks: bool = True) -> dict[str, Any]:
        """Tells what a checkpoint keeps; of this rank alone, without a word to others, for a copy."""
        raise NotImplementedError

    def _state_to_copy(self) -> dict[str, Any]:
        schedule = {name: getattr(self, name) for name in self._schedule}
        return {"schedule": schedule, "state": self._own_state(of_all_ranks=False)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what a copy is to have beside the arguments."""
        vars(self).update(state["schedule"])
        self.load_state_dict(state["state"])

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Tells how it is made again: see :mod:`pickle`."""
        return _made, (type(self), *self._arguments), self._state_to_copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedByArguments:
        """Copies it with all that it has."""
        known, layer = dict(memo), getattr(self, "output_layer", None)
        known.setdefault(id(layer), layer)
        made = _made(type(self), *copy.deepcopy(self._arguments, known))
        made.__setstate__(copy.deepcopy(self._state_to_copy(), known))
        memo[id(self)] = made
        return made


def _made(cls: type[CopiedByArguments], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CopiedByArguments:
    return cls(*args, **kwargs)
