"""A model's own ``forward``, and another in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from composer_gradmatch.forward.torch_private import compiled_by_inductor, uncompiled

__all__ = ["ModelForward"]


class ModelForward:
    """Runs a model's own forward pass, whatever is in its place, and puts another there for a time.

    Args:
        model (nn.Module): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        forward: Any = model.forward
        #: The model's forward before it was compiled, by Inductor or another backend; None where it was not.
        self._uncompiled: Callable[[Any], Any] | None = uncompiled(forward)
        self.by_inductor = compiled_by_inductor(forward)
        #: The model's own forward, compiled or not, while another is in its place.
        self.replaced: Callable[[Any], Any] | None = None
        self._instances: Any = None

    @property
    def eager(self) -> Callable[[Any], Any]:
        """The model's ``forward``, not compiled."""
        return self._uncompiled or self.model.forward

    def own(self, batch: Any) -> Any:
        """Tells what the model returns, uncompiled: Inductor draws other random numbers."""
        if self._uncompiled is not None:
            return self._uncompiled(batch)
        return self.model(batch) if self.replaced is None else self.replaced(batch)

    def replace(self, by: Callable[[Any], Any]) -> None:
        """Puts a function in the place of the model's ``forward``."""
        self.replaced, self._instances = self.model.forward, vars(self.model).get("forward")
        self.model.forward = by  # type: ignore[method-assign]

    def put_back(self) -> None:
        """Gives the model its own ``forward`` back, where another is in its place."""
        if self.replaced is None:
            return
        del self.model.forward
        if self._instances is not None:
            self.model.forward = self._instances
        self.replaced = self._instances = None
