"""The last layer's gradients beside losses, now and then: what a rule that looks at losses alone makes of the step."""

from __future__ import annotations

import logging

from composer.core import State

from composer_gradmatch.batches import copy_batch
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.forward.ranks import needs_all_ranks, unwrap
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.forward.torch_private import uncompiled

__all__ = ["Gauge"]

log = logging.getLogger(__name__)

#: Each look of this number shows the gradients, too.
_EVERY = 10


class Gauge:
    """Tells in which looks at losses gradients are looked at, too, which costs a backward pass of the output layer.

    Nothing is measured where a model has no linear output layer that can be found and runs once a sample, is compiled
    (a hook would compile it once more), or makes its forward passes on all ranks together.

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
        self._given_up = False

    def of_this_look(self, state: State) -> WatchedLayer | None:
        """Gives the output layer, if gradients are to be looked at; None if not.

        Args:
            state (State): The run's state.
        """
        looks, self._looks = self._looks, self._looks + 1
        if self._given_up or looks == 0 or looks % _EVERY:
            return None
        if looks == _EVERY:
            self._given_up = not self._can_measure(state)
        return None if self._given_up else self.layer

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
