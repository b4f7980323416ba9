"""The output layer of a run: found on the first batch, checked, and found again when it is replaced."""

from __future__ import annotations

from typing import Any

from composer.core import State
from torch import nn

from composer_gradmatch.forward.compiled import eagerly
from composer_gradmatch.forward.ranks import unwrap
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.forward.torch_private import changed_a_leaf_in_place
from composer_gradmatch.forward.traceless import no_trace
from composer_gradmatch.last_layer import (
    CheckedTap,
    OutputLayer,
    OutputLayerTap,
    check_named,
    observe_output_layer,
    resolve_output_layer,
)

__all__ = ["WatchedLayer"]


class WatchedLayer:
    """Finds the layer whose gradients stand for the model's, and taps it.

    Args:
        selection_pass (SelectionPass): Makes the pass in which it is found.
        chosen (str | nn.Module, optional): Its dotted name, or the module; None to find it. Default: ``None``.

    Attributes:
        sample_dim (int, optional): Which dimension of its inputs is the samples', once a tap has found it.

    Raises:
        TypeError: If ``chosen`` is something else.
    """

    def __init__(self, selection_pass: SelectionPass, chosen: str | nn.Module | None = None) -> None:
        if chosen is not None and not isinstance(chosen, str | nn.Module):
            raise TypeError(f"output_layer must be a dotted name, a module or None, got {chosen!r}.")
        self.selection_pass, self.chosen = selection_pass, chosen
        self.reset_fit()

    def reset_fit(self) -> None:
        """Forgets the layer: algorithms may have replaced modules since the last ``fit``."""
        self._layer: OutputLayer | None = None
        self._names: list[str] = []
        self.sample_dim: int | None = None
        #: Whether its output must be copied, since what follows changes it in place.
        self._changed_in_place = False

    def check(self, model: nn.Module) -> None:
        """Raises if a model has no such layer, as far as can be told without a batch.

        Args:
            model (nn.Module): The model.

        Raises:
            ValueError: If the name names no linear layer, or there is none at all.
        """
        if self.chosen is not None:
            check_named(model, self.chosen)
        elif not any(parameter.dim() > 1 for parameter in model.parameters()):
            raise ValueError(
                f"{type(model).__name__} has no nn.Linear, and no other weight that is a matrix, but "
                f"{self.selection_pass.owner} matches the gradients of a linear output layer. Use LossBackprop or "
                "RandomBackprop, which need none."
            )

    def of(self, state: State) -> OutputLayer:
        """Finds the layer, in a pass over a few samples of the batch, if it is not known."""
        model = unwrap(state.model)
        if self._layer is not None:
            now = [_module_at(model, name) for name in self._names]
            if any(each is not module for each, module in zip(now, self._layer.modules, strict=False)):
                self._layer = self.sample_dim = None  # It was replaced.
        if self._layer is None:
            batch, _ = self.selection_pass.few(state)
            batch = self.selection_pass.scaled(batch)
            with no_trace(model), self.selection_pass.precision(state), eagerly(model):
                if self.chosen is None:
                    self._layer = observe_output_layer(model, batch)
                else:
                    self._layer = resolve_output_layer(model, self.chosen, batch)
            names = {id(module): name for name, module in model.named_modules()}
            found = [names.get(id(module)) for module in self._layer.modules]
            self._names = [name for name in found if name is not None] if None not in found else []
        return self._layer

    def tap(self, state: State) -> OutputLayerTap:
        """Makes a tap of the layer, the first of which checks it."""
        layer = self.of(state)
        if self.sample_dim is None:
            return CheckedTap(unwrap(state.model), layer, self.chosen is not None)
        return OutputLayerTap(layer, self._changed_in_place, self.sample_dim)

    def learn(self, tap: OutputLayerTap) -> None:
        """Keeps what a tap has found, and says what it has to say."""
        self.sample_dim = tap.sample_dim
        if isinstance(tap, CheckedTap) and tap.warning is not None:
            self.selection_pass.warn(tap.warning)

    def is_spoilt_by(self, error: Exception) -> bool:
        """Tells whether an error comes of an output that is changed in place, which further taps copy then."""
        if self._changed_in_place or not changed_a_leaf_in_place(error):
            return False
        self._changed_in_place = True
        return True


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    module: Any = model
    for part in name.split(".") if name else []:
        module = getattr(module, part, None)
    return module
