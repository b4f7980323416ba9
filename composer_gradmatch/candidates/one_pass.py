"""Candidates from the training step's own forward pass over the whole minibatch, whose backward pass is the picks'."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from composer.core import State

from composer_gradmatch.batches import copy_batch
from composer_gradmatch.candidates.source import Source
from composer_gradmatch.candidates.two_passes import TwoPasses, candidates_of
from composer_gradmatch.forward.losses import per_sample_losses
from composer_gradmatch.forward.ranks import needs_all_ranks, unwrap
from composer_gradmatch.forward.sample_checks import Rows
from composer_gradmatch.last_layer.gradients import LayerGradients, all_finite
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost import Passes
from composer_gradmatch.rules.picks import Picks
from composer_gradmatch.spans import span

if TYPE_CHECKING:
    from composer_gradmatch.reuse.single_pass import SinglePass

__all__ = ["OnePass"]

_MODULE = "composer_gradmatch.reuse.single_pass"


def _import_single_pass() -> type[SinglePass]:
    """Imports TorchDynamo, which takes seconds, and interfaces of torch that other versions may not have."""
    try:
        from composer_gradmatch.reuse.single_pass import SinglePass
    except ImportError as error:
        raise UnsupportedError(f"torch {torch.__version__} is not a version that it works with ({error})") from error
    return SinglePass


class OnePass(Source):
    """Makes one forward pass where it can be captured and verified, and two where it cannot.

    Args:
        two_passes (TwoPasses): What is done instead.
        warn (Callable): Warns once a run.
    """

    def __init__(self, two_passes: TwoPasses, warn: Callable[[str], None]) -> None:
        super().__init__(two_passes.reader)
        self.two_passes, self.warn = two_passes, warn
        #: The pass; None until the first, and once it has been given up.
        self.single: SinglePass | None = None
        #: Whether it has been given up for this run.
        self.given_up = False

    @property
    def passes(self) -> Passes:
        """One where the step is served, else two."""
        return 1 if self.serves else 2

    @property
    def serves(self) -> bool:
        """Whether the Trainer's forward is served from the pass."""
        return self.single is not None and self.single.installed

    def reset_fit(self, state: State) -> None:
        """Forgets the pass, and gives the model its own ``forward`` back: see :class:`.Source`."""
        if sys.modules.get(_MODULE) is not None:
            _import_single_pass().release_model(unwrap(state.model))
        if self.single is not None:
            self.single.release()
        self.single, self.given_up = None, False
        self.two_passes.reset_fit(state)

    def begin_step(self) -> None:
        """Releases the pass of a step that an error has ended: see :class:`.Source`."""
        if self.single is not None:
            self.single.release()

    def look(self, state: State, num_samples: int) -> Candidates:
        """Looks by the training step's forward pass, or by one of its own: see :class:`.Source`."""
        if not self.given_up:
            try:
                return self._look_once(state, num_samples)
            except UndecidedError as error:
                self._make_two_passes_now(error)
            except UnsupportedError as error:
                self._give_up(str(error))
        return self.two_passes.look(state, num_samples)

    def rehearse(self, state: State, num_samples: int) -> Candidates:
        """Looks by a pass of its own: see :class:`.Source`."""
        return self.two_passes.look(state, num_samples)

    def rows_of(self, state: State, batch: Any, num_samples: int) -> Rows:
        """Looks as two passes do: see :class:`.Source`."""
        return self.two_passes.rows_of(state, batch, num_samples)

    def _look_once(self, state: State, num_samples: int) -> Candidates:
        selection_pass, watched = self.two_passes.selection_pass, self.two_passes.layer
        model = unwrap(state.model)
        if needs_all_ranks(model):
            raise UnsupportedError("its forward passes are ones of all ranks (FSDP, SyncBatchNorm)")
        if any(algorithm.backwards_create_graph for algorithm in state.algorithms):
            raise UnsupportedError("another algorithm wants the graph of the backward pass itself")
        if self.single is None:
            layer = None if watched is None else watched.of(state)
            self.single = _import_single_pass()(model, lambda: selection_pass.precision(state), layer)
        single = self.single
        with span("selection_forward"):
            outputs = single.forward(state.batch, num_samples)
        with single.no_trace(), selection_pass.precision(state):
            # Of a copy, since a loss may change its batch in place.
            losses = selection_pass.losses_of(state, outputs, copy_batch(state.batch), num_samples)
        if watched is None:
            return self._candidates_by_losses(state, single, losses, num_samples)
        with span("output_gradients"):
            rows = single.inputs_and_grads(losses)
            inputs, grads, outputs = (each.movedim(watched.sample_dim or 0, 0) for each in rows)
        layer = watched.of(state)
        gradients = LayerGradients.of(layer, inputs, grads, outputs, num_samples)
        labels = self.labels_of(state.batch, num_samples)
        return candidates_of(num_samples, losses.detach(), [gradients], layer, labels)

    def _candidates_by_losses(
        self, state: State, single: SinglePass, losses: torch.Tensor, num_samples: int
    ) -> Candidates:
        """Gives losses and, now and then, the gradients that tell how long the step is."""
        gauge, seen, labels = self.two_passes.gauge, losses.detach(), self.labels_of(state.batch, num_samples)
        assert gauge is not None
        measured = gauge.of_training_pass(state, single, losses)
        if measured is None:
            return Candidates(num_samples, losses=seen, labels=labels, finite=lambda: bool(all_finite(seen)))
        layer, gradients = measured
        candidates = candidates_of(num_samples, seen, [gradients], layer, labels)
        candidates.look_at_losses_only()
        return candidates

    def serve(self, state: State, picks: Picks) -> None:
        """Serves the picks' part of the pass to the Trainer: see :class:`.Source`."""
        single = self.single
        if single is None or not single.pending:
            return
        n, loss_fn = len(picks.indices), self.two_passes.selection_pass.loss_fn

        def losses(outputs: Any, batch: Any) -> torch.Tensor:
            return per_sample_losses(unwrap(state.model), outputs, batch, n, loss_fn)

        try:
            single.serve(picks.indices, state.batch, picks.weights, losses)
            for failure in single.compile_failures:
                self.warn(f"Inductor cannot compile the reused pass, which runs uncompiled: {failure}.")
        except UndecidedError as error:
            self._make_two_passes_now(error)
        except UnsupportedError as error:
            self._give_up(str(error))

    def end_selection(self) -> None:
        """Lets a pass be as if it had not been that nothing was picked from: see :class:`.Source`."""
        if self.single is not None:
            self.single.abandon()

    def end_step(self) -> None:
        """Releases the pass, and gives it up if the Trainer did not ask for it: see :class:`.Source`."""
        assert self.single is not None
        self.single.release()
        if self.single.missed is not None:
            self._give_up(self.single.missed)

    def _make_two_passes_now(self, error: UndecidedError) -> None:
        """Says that one minibatch showed too little of a pass to reuse it."""
        self.warn(f"two forward passes are made until one can be verified: {error}.")

    def _give_up(self, reason: str) -> None:
        """Gives up reusing activations for the rest of the run."""
        if self.single is not None:
            self.single.abandon()
        self.single, self.given_up = None, True
        self.warn(
            f"the activations of the selection pass cannot be used in the backward pass, so two forward passes are "
            f"made: {reason}."
        )
