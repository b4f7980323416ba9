"""The state of numpy's global generator, which costs next to nothing to keep while nobody draws from it.

``np.random.get_state`` and ``set_state`` copy 624 numbers one by one, in Python's time. That nothing was drawn can be
told sooner, from the generator's memory: numpy gives its address in public (``BitGenerator.ctypes``).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.random import mtrand

__all__ = ["NumpyState"]

#: Of the Mersenne Twister: 624 numbers of 32 bits, and the position among them.
_NUM_BYTES = 4 * 625


@dataclass(frozen=True, eq=False)
class NumpyState:
    """The state of numpy's global generator at one moment.

    Attributes:
        generator (Any): The bit generator that it is of.
        memory (bytes, optional): All of the state as it lies in memory; None where that does not tell of each draw.
        state (tuple): As ``np.random.get_state`` returns it.
    """

    generator: Any
    memory: bytes | None
    state: Any
    _last: ClassVar[NumpyState | None] = None

    @classmethod
    def now(cls) -> NumpyState:
        """Takes the state as it is."""
        if cls._last is not None and cls._last._is_in_memory():
            return cls._last
        generator: Any = mtrand.get_bit_generator()
        state = np.random.get_state()
        NumpyState._last = now = cls(generator, _memory_that_tells(generator, state), state)
        return now

    def restore(self) -> None:
        """Puts it back, if anything was drawn."""
        if not self._is_in_memory():
            np.random.set_state(self.state)

    def is_now(self) -> bool:
        """Tells whether nothing has been drawn since."""
        now = NumpyState.now()
        return now is self or all(np.array_equal(one, other) for one, other in zip(self.state, now.state, strict=True))

    def _is_in_memory(self) -> bool:
        if self.memory is None:
            return False
        generator = mtrand.get_bit_generator()
        return generator is self.generator and _memory(generator) == self.memory


def _memory(generator: Any) -> bytes:
    return ctypes.string_at(generator.ctypes.state_address, _NUM_BYTES)


def _memory_that_tells(generator: Any, state: Any) -> bytes | None:
    """Gives the generator's memory, if it is what the state says, and there is nothing else to draw from.

    A second normal number that is kept for the next draw lies elsewhere, and is drawn without a trace in the memory.
    """
    if not isinstance(generator, np.random.MT19937):
        return None
    _, key, position, has_gauss, _ = state
    memory = _memory(generator)
    expected = np.asarray(key, np.uint32).tobytes() + np.int32(position).tobytes()
    return memory if memory == expected and not has_gauss else None
