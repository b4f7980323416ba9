"""What a user adds by decorator: models, data sets, rules and losses, under the names of their functions.

::

    from composer_gradmatch import register

    @register.model
    def my_net(width: int = 64):
        return torch.nn.Sequential(...)

    @register.rule(needs="losses", weighs=False)
    def largest_losses(candidates, m):
        return candidates.losses.topk(m).indices, None

A file of such functions is given to the command lines as ``--register FILE.py``; in a Python program they are there
once their module is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

__all__ = ["KINDS", "Register", "Registered", "register", "registered"]

#: What can be added.
KINDS = ("model", "data set", "rule", "loss")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Registered:
    """A function that was added.

    Attributes:
        function (Callable): The function, or class.
        options (Mapping[str, Any], optional): What else was said of it. Default: ``{}``.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Its file and line."""
        return place_of(self.function)

    @property
    def signature(self) -> inspect.Signature:
        """What it takes."""
        return inspect.signature(self.function)


def place_of(function: Callable[..., Any]) -> str:
    """Tells the file and the line of a function or class."""
    try:
        return f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):  # Written in a shell, or made by what leaves no source.
        return f"module {function.__module__}"


_tables: dict[str, dict[str, Registered]] = {kind: {} for kind in KINDS}


def registered(kind: str) -> dict[str, Registered]:
    """Gives what was added of one of :data:`KINDS`, by name."""
    return _tables[kind]


class Register:
    """The decorators. Each leaves the function as it is."""

    def model(self, function: Function) -> Function:
        """Adds a model: a function that returns a ComposerModel, or a module.

        A module is made a ComposerClassifier, for which ``num_classes`` stands beside the function's own arguments in
        YAML; ``loss_fn`` there may name a loss.

        Args:
            function (Callable): Its arguments are keys of YAML's ``model:``, and its annotations their types.

        Raises:
            ValueError: If another model has the name.
        """
        return self._add("model", function)

    def data(self, function: Function) -> Function:
        """Adds a data set: a function that returns one with a length and samples by number.

        Args:
            function (Callable): Its arguments are keys of YAML's ``dataset:``, and its annotations their types.

        Raises:
            ValueError: If another data set has the name.
        """
        return self._add("data set", function)

    def loss(self, function: Function) -> Function:
        """Adds a loss, for ``loss_fn`` of algorithms and of models that are made ComposerClassifiers.

        Args:
            function (Callable): A function of (outputs, batch) that returns the loss of each sample, shape (M,).

        Raises:
            ValueError: If another loss has the name.
        """
        return self._add("loss", function)

    @overload
    def rule(self, function: Function) -> Function: ...

    @overload
    def rule(self, **options: Any) -> Callable[[Function], Function]: ...

    def rule(self, function: Any = None, **options: Any) -> Any:
        """Adds a rule: ``@register.rule``, or with what else :class:`.Rule` holds, ``@register.rule(needs="losses")``.

        Args:
            function (Callable): A function of (candidates, m), or a class: see :class:`.Rule`.
            options: Attributes of :class:`.Rule`.

        Raises:
            ValueError: If another rule has the name.
        """
        if function is None:
            return lambda function: self._add("rule", function, options)
        return self._add("rule", function, options)

    @staticmethod
    def _add(kind: str, function: Any, options: Mapping[str, Any] | None = None) -> Any:
        name = getattr(function, "__name__", None)
        if not callable(function) or name is None:
            raise TypeError(f"A {kind} is registered as a function with a name; got {function!r}.")
        other = _tables[kind].get(name)
        # A cell of a notebook may be run again.
        if other is not None and function.__module__ != "__main__":
            raise ValueError(
                f"A {kind} {name!r} is registered already, at {other.where}. Give one of them another name."
            )
        _tables[kind][name] = Registered(function, options or {})
        return function


register = Register()
