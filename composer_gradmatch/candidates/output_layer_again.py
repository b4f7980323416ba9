"""The output layer once more, alone: losses and P of stored inputs at the layer's current weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from composer.core import State

from composer_gradmatch.batches import copy_batch
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.forward.compiled import eagerly
from composer_gradmatch.forward.ranks import is_sharded, unwrap
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.last_layer import OutputLayer, OutputLayerTap

__all__ = ["OutputLayerAgain", "are_the_layers"]


class _Outputs(dict):
    """What a HuggingFace model returns, as far as its loss reads it."""

    @property
    def logits(self) -> torch.Tensor:
        return self["logits"]


def are_the_layers(outputs: Any, output: torch.Tensor) -> torch.Tensor | bool:
    """Tells whether what a model returns, or its logits, is its output layer's output as it is.

    Args:
        outputs (Any): What the model returned.
        output (torch.Tensor): The layer's output.

    Returns:
        torch.Tensor | bool: A boolean, which may be on the model's device.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    if not isinstance(found, torch.Tensor) or found.shape != output.shape:
        return False
    found, output = found.detach().float(), output.detach().float()
    return ((found == output) | (found.isnan() & output.isnan())).all()


def _made_of(output: torch.Tensor, outputs: Any) -> Any:
    """Gives a model's outputs made of its output layer's alone; None if that is not what it returns."""
    if isinstance(outputs, torch.Tensor):
        return output if outputs.shape == output.shape else None
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if isinstance(logits, torch.Tensor) and logits.shape == output.shape:
        return _Outputs(logits=output)
    return None


class OutputLayerAgain:
    """Computes what follows from rows of H alone.

    Args:
        selection_pass (SelectionPass): Knows the samples' losses.
        layer (WatchedLayer, optional): The output layer; without one nothing can be computed.
    """

    def __init__(self, selection_pass: SelectionPass, layer: WatchedLayer | None) -> None:
        self.selection_pass, self._watched = selection_pass, layer
        #: Whether the model returns a mapping with the layer's output as its logits.
        self._returns_mapping = False

    def _layer(self, state: State) -> OutputLayer:
        assert self._watched is not None
        return self._watched.of(state)

    def is_what_the_loss_takes(self, state: State) -> bool:
        """Tells, by some samples of the batch, whether the model returns the layer's output, and the loss takes that.

        That losses come out the same is not enough: what is made of the output (a clamp, or 30·tanh(z/30)) may hardly
        change it where logits are as small as at first.
        """
        assert self._watched is not None
        if is_sharded(unwrap(state.model).modules()) or self._watched.sample_dim not in (None, 0):
            return False
        batch, few = self.selection_pass.few(state)
        with (
            self.selection_pass.no_trace(state),
            eagerly(unwrap(state.model)),
            OutputLayerTap(self._layer(state)).open() as tap,
        ):
            outputs, losses = self.selection_pass.forward(state, copy_batch(batch), few)
            again = _made_of(tap.leaf.detach(), outputs)
            if again is None or not are_the_layers(outputs, tap.leaf):
                return False
            self._returns_mapping = isinstance(again, _Outputs)
            with torch.no_grad(), self.selection_pass.precision(state):
                losses_again = self.selection_pass.losses_of(state, again, copy_batch(batch), few)
        return bool(torch.allclose(losses.detach(), losses_again, rtol=1e-4, atol=1e-6, equal_nan=True))

    def logits(self, state: State, inputs: torch.Tensor) -> torch.Tensor:
        """Computes the layer's output, without a graph.

        Args:
            state (State): The run's state.
            inputs (torch.Tensor): Rows of H, shape (n, D).
        """
        layer = self._layer(state)
        with torch.no_grad(), self.selection_pass.precision(state):
            return F.linear(inputs.to(layer.weight.dtype), layer.weight, layer.bias)

    def losses_and_grads(self, state: State, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the losses and P of all samples of the batch.

        Args:
            state (State): The run's state.
            inputs (torch.Tensor): H, shape (M, D).

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Losses, shape (M,), and P, shape (M, C), float32.
        """
        leaf = self.logits(state, inputs).requires_grad_()
        outputs: Any = _Outputs(logits=leaf) if self._returns_mapping else leaf
        batch = copy_batch(state.batch)
        with self.selection_pass.no_trace(state), torch.enable_grad(), self.selection_pass.precision(state):
            losses = self.selection_pass.losses_of(state, outputs, batch, len(inputs))
            (grads,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), grads.float()
