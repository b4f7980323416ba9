"""The last layer's gradients beside losses, now and then: what a rule that looks at losses alone makes of the step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from composer.core import State

from composer_gradmatch.batches import copy_batch
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.forward.ranks import needs_all_ranks, unwrap
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.forward.torch_private import uncompiled
from composer_gradmatch.last_layer import OutputLayer
from composer_gradmatch.last_layer.gradients import LayerGradients
from composer_gradmatch.last_layer.graph import learned_behind

if TYPE_CHECKING:
    from composer_gradmatch.reuse.single_pass import SinglePass

__all__ = ["Gauge"]

log = logging.getLogger(__name__)

#: Each look of this number shows the gradients, too.
_EVERY = 10


class Gauge:
    """Tells in which looks at losses gradients are looked at, too, which costs a backward pass of the output layer.

    Nothing is measured where a model has no linear output layer that can be found and runs once a sample, is compiled
    (a hook would compile it once more), or makes its forward passes on all ranks together. A training step's own pass
    has watched no layer: its H is looked for among what it has saved, so that it is the same pass with and without.

    Args:
        selection_pass (SelectionPass): Makes the passes.
    """

    def __init__(self, selection_pass: SelectionPass) -> None:
        self.selection_pass, self.layer = selection_pass, WatchedLayer(selection_pass)
        self.reset_fit()

    def reset_fit(self) -> None:
        """Forgets what belongs to one ``fit``."""
        self.layer.reset_fit()
        self._looks = 0
        self._tried = self._given_up = False

    def is_due(self) -> bool:
        """Tells whether gradients are to be looked at in this look, asked once in each; the first is the rehearsal."""
        looks, self._looks = self._looks, self._looks + 1
        return looks > 0 and looks % _EVERY == 0

    def of_this_look(self, state: State) -> WatchedLayer | None:
        """Gives the output layer, if gradients are to be looked at; None if not.

        Args:
            state (State): The run's state.
        """
        if not self.is_due() or self._given_up:
            return None
        if not self._tried:
            self._tried, self._given_up = True, not self._can_measure(state)
        return None if self._given_up else self.layer

    def of_training_pass(
        self, state: State, single: SinglePass, losses: torch.Tensor
    ) -> tuple[OutputLayer, LayerGradients] | None:
        """Gives the output layer and H and P of a training step's own pass, if they are to be looked at; None if not.

        Args:
            state (State): The run's state.
            single (SinglePass): The pass.
            losses (torch.Tensor): The samples' losses, shape (M,), with their graph.
        """
        model = unwrap(state.model)
        if not self.is_due() or uncompiled(model.forward) is not None:
            return None
        try:
            found = single.saved_inputs_and_grads(losses)
            if found is None:
                return None
            layer, inputs, grads, leaf = found
            if learned_behind(losses, leaf, model):
                return None
        except RuntimeError as error:  # Of a loss whose gradient cannot be had, which selection by losses does not ask.
            log.info("%s does not tell how long this step is: %s", self.selection_pass.owner, error)
            return None
        return layer, LayerGradients.of(layer, inputs, grads, leaf.detach().reshape(grads.shape), len(losses))

    def _can_measure(self, state: State) -> bool:
        """Tells, by some samples of the batch, whether each has one row of gradients that can be found."""
        model = unwrap(state.model)
        if needs_all_ranks(model) or uncompiled(model.forward) is not None:
            return False
        batch, few = self.selection_pass.few(state)
        try:
            with self.selection_pass.no_trace(state), self.layer.tap(state).open() as tap:
                _, losses = self.selection_pass.forward(state, copy_batch(batch), few)
                inputs, _ = tap.inputs_and_grads(losses)
        except (ValueError, TypeError, RuntimeError) as error:
            # What is wrong with the model, rather than with its output layer, the look at losses raises, too.
            log.info("%s does not tell how long its steps are: %s", self.selection_pass.owner, error)
            return False
        self.layer.learn(tap)
        return inputs.dim() == 2
