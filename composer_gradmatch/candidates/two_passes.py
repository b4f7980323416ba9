"""Candidates from a forward pass of their own, beside which the training step makes another one on the picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer.core import State

from composer_gradmatch.candidates.gauge import Gauge
from composer_gradmatch.candidates.source import Source
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.forward.compiled import eagerly
from composer_gradmatch.forward.ranks import unwrap
from composer_gradmatch.forward.sample_checks import Rows, normalised_by_running_statistics
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.last_layer import OutputLayer, OutputLayerTap
from composer_gradmatch.last_layer.gradients import (
    LayerGradients,
    all_finite,
    all_grads,
    all_inputs,
    gram_of_all,
    joined,
)
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost import Passes
from composer_gradmatch.spans import span

__all__ = ["TwoPasses", "candidates_of"]


def candidates_of(
    num_samples: int,
    losses: torch.Tensor,
    parts: Sequence[LayerGradients],
    layer: OutputLayer,
    labels: Callable[[], torch.Tensor] | None = None,
) -> Candidates:
    """Makes candidates of what was seen at the output layer.

    Args:
        num_samples (int): M.
        losses (torch.Tensor): ℓ, shape (M,).
        parts (Sequence[LayerGradients]): H and P, in the order of the samples.
        layer (OutputLayer): The output layer.
        labels (Callable, optional): Reads the samples' classes. Default: ``None``.
    """

    def gram() -> torch.Tensor:
        with span("gram"):
            return gram_of_all(parts, layer)

    counts = None
    if parts[0].counts is not None:
        counts = torch.cat([part.counts for part in parts if part.counts is not None])
    return Candidates(
        num_samples,
        losses=losses,
        inputs=lambda: all_inputs(parts),
        output_grads=lambda: all_grads(parts, layer),
        gram=gram,
        counts=counts,
        labels=labels,
        finite=lambda: all(bool(part.finite) for part in parts) and bool(all_finite(losses)),
    )


class TwoPasses(Source):
    """Makes a selection pass over the whole minibatch.

    Args:
        selection_pass (SelectionPass): Makes it.
        layer (WatchedLayer, optional): The output layer; None for the samples' losses alone, beside which gradients
            are measured now and then. Default: ``None``.
    """

    def __init__(self, selection_pass: SelectionPass, layer: WatchedLayer | None = None) -> None:
        super().__init__(selection_pass.reader)
        self.selection_pass, self.layer = selection_pass, layer
        #: Shown what the model returned, and its output layer's output, in each pass that looks at gradients.
        self.shows: Callable[[Any, torch.Tensor], None] | None = None
        #: Tells what the steps of a rule that looks at losses are worth; None for one that looks at gradients.
        self.gauge = Gauge(selection_pass) if layer is None else None

    def reset_fit(self, state: State) -> None:
        """Forgets what belongs to one ``fit``: see :class:`.Source`."""
        if self.gauge is not None:
            self.gauge.reset_fit()

    @property
    def passes(self) -> Passes:
        """Two: see :class:`.Source`."""
        return 2

    def look(self, state: State, num_samples: int) -> Candidates:
        """Looks at the samples' losses and, with an output layer, at their last-layer gradients: :class:`.Source`."""
        watched = self.layer if self.gauge is None else self.gauge.of_this_look(state)
        if watched is None:
            return self._look_at_losses(state, num_samples)
        layer = watched.of(state)
        with self.selection_pass.no_trace(state):
            parts = self.selection_pass.in_microbatches(
                state, num_samples, lambda batch, n: self._gradients(state, watched, batch, n, num_samples)
            )
        losses, labels = joined([losses for _, losses in parts]), self.labels_of(state.batch, num_samples)
        candidates = candidates_of(num_samples, losses, [gradients for gradients, _ in parts], layer, labels)
        if self.gauge is not None:
            # The rule sees losses, and only what they are decides whether it can.
            candidates.look_at_losses_only()
        return candidates

    @torch.no_grad()
    def _look_at_losses(self, state: State, num_samples: int) -> Candidates:
        with self.selection_pass.no_trace(state):
            parts = self.selection_pass.in_microbatches(
                state, num_samples, lambda batch, n: self.selection_pass.forward(state, batch, n)[1]
            )
        losses, labels = joined(parts).detach(), self.labels_of(state.batch, num_samples)
        return Candidates(num_samples, losses=losses, labels=labels, finite=lambda: bool(all_finite(losses)))

    def _gradients(
        self, state: State, layer: WatchedLayer, batch: Any, n: int, num_samples: int
    ) -> tuple[LayerGradients, torch.Tensor]:
        try:
            with eagerly(unwrap(state.model)), layer.tap(state).open() as tap:
                outputs, losses = self.selection_pass.forward(state, batch, n)
                if self.shows is not None:
                    self.shows(outputs, tap.leaf)
                with span("output_gradients"):
                    inputs, grads = tap.inputs_and_grads(losses)
                losses = losses.detach()
                del outputs  # And with it the graph of the loss, which holds copies of the output.
        except (RuntimeError, ValueError) as error:
            if not layer.is_spoilt_by(error):
                raise
            return self._gradients(state, layer, batch, n, num_samples)
        layer.learn(tap)
        return LayerGradients.of(tap.layer, inputs, grads, tap.outputs, num_samples), losses

    def rows_of(self, state: State, batch: Any, num_samples: int) -> Rows:
        """Tells what is looked at of the samples of a small batch: :class:`.Source`."""

        def of_losses(samples: torch.Tensor) -> dict[str, torch.Tensor]:
            with (
                torch.no_grad(),
                self.selection_pass.no_trace(state),
                normalised_by_running_statistics(unwrap(state.model)),
            ):
                part = self.selection_pass.reader.copy_of(batch, samples, num_samples)
                _, losses = self.selection_pass.forward(state, part, num_samples)
            return {"the losses": losses}

        if self.layer is None:
            return of_losses
        watched = self.layer
        layer = watched.of(state)

        def of_gradients(samples: torch.Tensor) -> dict[str, torch.Tensor]:
            with (
                self.selection_pass.no_trace(state),
                normalised_by_running_statistics(unwrap(state.model)),
                eagerly(unwrap(state.model)),
                OutputLayerTap(layer, sample_dim=watched.sample_dim).open() as tap,
            ):
                part = self.selection_pass.reader.copy_of(batch, samples, num_samples)
                _, losses = self.selection_pass.forward(state, part, num_samples)
                inputs, grads = tap.inputs_and_grads(losses)
            return {"the output layer's inputs": inputs, "its outputs' gradients": grads, "the losses": losses.detach()}

        return of_gradients
