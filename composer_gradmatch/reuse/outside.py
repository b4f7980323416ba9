"""Numbers that a forward pass reads from where Dynamo sets no guard: attributes of classes, and the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from composer_gradmatch.forward.torch_private import UserDefinedClassVariable

__all__ = ["NumbersOutside"]

_MISSING = object()


class NumbersOutside:
    """Tells captures apart by the values that Dynamo took for constants.

    Dynamo guards globals, attributes of objects and items of containers. Of a literal that is read from a class
    (``Config.scale``) it makes a constant without a guard, and of a variable of the environment that is not set, too.
    """

    def __init__(self) -> None:
        self._attributes: dict[tuple[type, str], None] = {}
        self._environment = False
        self._numbers: dict[tuple[Any, ...], int] = {}

    def number(self) -> int:
        """Gives a number for the values as they are, the same whenever they are the same."""
        return self._numbers.setdefault(self._values(), len(self._numbers))

    def reads_environment(self, number: int) -> None:
        """Lets the environment count from now on, which as it is has a ``number`` already."""
        self._environment = True
        self._numbers[self._values()] = number

    @contextmanager
    def recorded(self) -> Iterator[int]:
        """Takes down what is read, if a capture happens inside the context.

        Yields:
            int: The number of the values, which after the context is that of what was taken down, too.
        """
        number, original = self.number(), UserDefinedClassVariable.var_getattr

        def var_getattr(variable: Any, tx: Any, name: str) -> Any:
            self._take_down(variable.value, name)
            return original(variable, tx, name)

        UserDefinedClassVariable.var_getattr = var_getattr
        try:
            yield number
        finally:
            UserDefinedClassVariable.var_getattr = original
            self._numbers[self._values()] = number

    def _take_down(self, owner: Any, name: str) -> None:
        own = isinstance(owner, type) and owner.__module__.partition(".")[0] != "torch"
        if own and isinstance(_value(owner, name), bool | int | float | str | None):
            self._attributes[owner, name] = None

    def _values(self) -> tuple[Any, ...]:
        values = [_value(owner, name) for owner, name in self._attributes]
        read = tuple((type(value), value) if _is_hashable(value) else id(value) for value in values)
        return (*read, *os.environ.items()) if self._environment else read


def _value(owner: type, name: str) -> Any:
    return next((vars(base)[name] for base in owner.__mro__ if name in vars(base)), _MISSING)


def _is_hashable(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None) or value is _MISSING
