"""What a training step shows of its picks, for a store: rows of H by a hook, and losses from its outputs."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import State

from composer_gradmatch.batches import copy_batch
from composer_gradmatch.candidates.output_layer_again import are_the_layers
from composer_gradmatch.candidates.sample_store import Seen
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.forward.compiled import is_compiled
from composer_gradmatch.forward.ranks import unwrap
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.forward.traceless import beside_training
from composer_gradmatch.last_layer import Watch

__all__ = ["TrainingLooks"]


class TrainingLooks:
    """Watches the microbatches of a training step; of a compiled model, which a hook would compile anew, no layer.

    It is shown the passes of looks, too, for :attr:`returned_as_it_is`.

    Args:
        selection_pass (SelectionPass): Knows the samples' losses.
        layer (WatchedLayer, optional): The output layer; None for losses alone.
    """

    def __init__(self, selection_pass: SelectionPass, layer: WatchedLayer | None) -> None:
        self.selection_pass, self.layer = selection_pass, layer
        self._watch: Watch | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets a step."""
        self._close()
        self._inputs: torch.Tensor | None = None
        self._outputs: torch.Tensor | None = None
        self._version = 0
        self._seen: list[Seen] = []
        self._samples: set[int] = set()
        self._as_it_is: list[torch.Tensor | bool] = []

    @property
    def returned_as_it_is(self) -> bool:
        """Whether the model has returned the layer's output as it is in all of the step, and in its look."""
        return all(map(bool, self._as_it_is))

    def compare(self, outputs: Any, output: torch.Tensor) -> None:
        """Takes note of whether the model has returned the layer's output as it is, in a pass of a look.

        Args:
            outputs (Any): What the model returned.
            output (torch.Tensor): The layer's output.
        """
        self._as_it_is.append(are_the_layers(outputs, output))

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    def before_forward(self, state: State) -> None:
        """Begins to watch a microbatch."""
        self._close()
        self._inputs = self._outputs = None
        if self.layer is not None and not is_compiled(state.model):
            self._watch = self.layer.of(state).watch(self._see)
            self._watch.open()

    def _see(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        self._inputs, self._outputs, self._version = inputs, output, output._version
        return output  # So that the loss goes through what was seen.

    def before_loss(
        self,
        state: State,
        numbers: torch.Tensor | None,
        rows: torch.Tensor | None,
        with_losses: bool = True,
        with_grads: bool = False,
    ) -> None:
        """Takes what the microbatch has shown.

        A microbatch of rows that the step has shown before is no look: where the step is made again, it may be at other
        weights (SAM's are perturbed).

        Args:
            state (State): After the forward pass.
            numbers (torch.Tensor, optional): Its samples' numbers; None if its rows are not what was picked any more.
            rows (torch.Tensor, optional): Which rows of the minibatch they are, likewise.
            with_losses (bool, optional): Whether losses are asked for. Default: ``True``.
            with_grads (bool, optional): Whether P is, too; then losses are. Default: ``False``.
        """
        self._close()
        inputs, outputs = self._inputs, self._outputs
        self._inputs = self._outputs = None
        if outputs is not None:
            unchanged = isinstance(outputs, torch.Tensor) and outputs._version == self._version
            self._as_it_is.append(unchanged and are_the_layers(state.outputs, outputs))
        if numbers is None or rows is None or (self.layer is not None and inputs is None):
            return
        if self._samples.issuperset(rows.tolist()):
            return
        self._samples.update(rows.tolist())
        n = len(numbers)
        losses, grads = (
            self._losses_and_grads(state, outputs if with_grads else None, n) if with_losses else (None,) * 2
        )
        if with_grads and grads is None:
            return
        dim = 0 if self.layer is None else self.layer.sample_dim or 0
        parts = [None if part is None else part.detach().movedim(dim, 0) for part in (inputs, grads)]
        if any(part is not None and (part.dim() != 2 or len(part) != n) for part in parts):
            return
        self._seen.append(Seen(numbers, losses, *parts))

    def _losses_and_grads(
        self, state: State, outputs: torch.Tensor | None, n: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the microbatch's losses and, at the given outputs, their gradients."""
        batch, grads = copy_batch(state.batch), None
        needs_graph = outputs is not None and outputs.requires_grad
        with beside_training(unwrap(state.model)), torch.set_grad_enabled(needs_graph):
            with self.selection_pass.precision(state):
                losses = self.selection_pass.losses_of(state, state.outputs, batch, n)
            if needs_graph:
                assert outputs is not None
                (grads,) = torch.autograd.grad(losses.sum(), outputs, retain_graph=True, allow_unused=True)
        return losses.detach(), grads

    def end(self) -> list[Seen]:
        """Gives what was seen in the step, and forgets it."""
        seen = self._seen
        self.clear()
        return seen
