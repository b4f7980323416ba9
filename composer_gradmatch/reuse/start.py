"""Going back to where a forward pass began."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import nn

from composer_gradmatch.forward.modules import modules_of
from composer_gradmatch.forward.traceless import Generators
from composer_gradmatch.forward.traces import ModelTraces

__all__ = ["Start"]


class Start:
    """Remembers what a model and the generators are when its forward pass begins.

    Args:
        model (nn.Module): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._traces = model, ModelTraces(modules_of(model))
        #: The generators before and after the forward pass.
        self._before = self._after = Generators.now()

    def pass_is_over(self) -> None:
        """Remembers the generators as the pass has left them."""
        self._after = Generators.now()

    def rewind(self) -> None:
        """Puts buffers and generators back, for the pass to be made once more."""
        self._traces.restore_buffers()
        self._before.restore()

    def restore(self) -> None:
        """Puts the model and the generators back."""
        self._traces.restore()
        self._before.restore()

    def undo(self) -> None:
        """Puts the model back, and the generators unless a selection has drawn since: it would draw the same again."""
        self._traces.restore()
        self._rewind_generators()

    def undo_but_for_changes(self, as_they_were: Set[int]) -> None:
        """Puts back the buffers that the pass has changed, and the generators as :meth:`undo` does.

        Args:
            as_they_were (Set[int]): The ids of the parameters and buffers that nothing has changed since the pass.
        """
        kept = [(buffer, buffer.clone()) for buffer in self._model.buffers() if id(buffer) not in as_they_were]
        held = [(module, dict(module._buffers)) for module in self._model.modules()]
        self._traces.restore_buffers()
        self._rewind_generators()
        with torch.no_grad():
            for buffer, content in kept:
                buffer.copy_(content)
        for module, buffers in held:
            module._buffers.update(buffers)

    def _rewind_generators(self) -> None:
        if self._after.is_now():
            self._before.restore()
