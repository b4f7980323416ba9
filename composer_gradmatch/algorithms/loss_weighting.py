"""Weights into the loss: showing that they would make the weighted objective, and making it in each microbatch."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from composer.core import State, get_precision_context

from composer_gradmatch.batches import copy_batch
from composer_gradmatch.batches.given_batch import GivenBatch
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.forward.huggingface_losses import huggingface_losses
from composer_gradmatch.forward.loss_scale import LossScale
from composer_gradmatch.forward.losses import (
    check_objective,
    differentiable_outputs,
    per_sample_losses,
    takes_loss_from_logits,
    weighted_loss,
)
from composer_gradmatch.forward.ranks import unwrap
from composer_gradmatch.forward.sample_checks import check_independence, normalised_by_running_statistics
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.forward.traceless import Moment, back_at
from composer_gradmatch.last_layer import OutputLayerTap

__all__ = ["LossWeighting"]


class LossWeighting:
    """Makes the model's own loss of a microbatch that of its weighted samples.

    Args:
        selection_pass (SelectionPass): Knows the samples' losses, and makes the passes of the check.
        layer (WatchedLayer, optional): The output layer, at which gradients are compared; None for what the model
            returns. Default: ``None``.
    """

    def __init__(self, selection_pass: SelectionPass, layer: WatchedLayer | None = None) -> None:
        self.selection_pass, self.layer = selection_pass, layer
        self.reset()

    def reset(self) -> None:
        """Forgets what belongs to one Trainer."""
        #: What a checkpoint says of the loss's scale.
        self._known_scale: dict[str, Any] = {}
        self.reset_fit()

    def reset_fit(self) -> None:
        """Forgets what belongs to one ``fit``."""
        self._scale = LossScale()
        self._scale.load_state_dict(self._known_scale)
        self._given: GivenBatch | None = None
        self._moment: Moment | None = None
        #: Whether the model's loss draws random numbers, or changes its buffers or attributes.
        self._leaves_traces = False

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps: the scale of the model's own loss."""
        return self._scale.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._known_scale = state
        self._scale.load_state_dict(state)

    def check(self, state: State, batch: Any, num_samples: int) -> None:
        """Shows that a small batch's weighted losses are the model's own loss, its samples weighted.

        Args:
            state (State): The run's state.
            batch (Any): A copy of some samples, which it may change.
            num_samples (int): Their number.

        Raises:
            TypeError: If the model's own loss is not one tensor.
            ValueError: If the losses do not make it, or depend on other samples.
        """
        model = unwrap(state.model)
        layer = None if self.layer is None else self.layer.of(state)
        sample_dim = None if self.layer is None else self.layer.sample_dim
        tap = None if layer is None else OutputLayerTap(layer, sample_dim=sample_dim)
        with (
            self.selection_pass.no_trace(state),
            normalised_by_running_statistics(model) if num_samples == 1 else nullcontext(),
            torch.enable_grad() if tap is None else tap.open(),
        ):
            with self.selection_pass.precision(state):
                batch = self.selection_pass.scaled(batch)
                outputs = self.selection_pass.outputs_of(state, batch)
                before = Moment.now(model)
                losses = self.selection_pass.losses_of(state, outputs, copy_batch(batch), num_samples)
                self._leaves_traces |= not before.is_now()
                before.restore()
                own_loss: Any = model.loss(outputs, batch)  # type: ignore[operator]
            # Before the context puts back what these graphs have saved.
            points = differentiable_outputs(outputs) if tap is None else [tap.leaf]
            check_objective(losses, own_loss, points, self._scale)
            mixed = any(check_independence(losses, point, sample_dim or 0) is not None for point in points)
        if mixed:
            raise ValueError(
                "The loss of a sample depends on the outputs of other samples (a contrastive loss over the batch, or "
                "batch normalisation behind the output layer), so that a subset's weighted losses do not stand for the "
                "minibatch's. Use RandomBackprop; or pass as output_layer the last layer in front of what mixes the "
                "samples and, as loss_fn, a loss of each sample on its own."
            )

    def before_loss(self, state: State) -> None:
        """Keeps what the model's own loss is given, which may change it."""
        self._given = GivenBatch(state.batch)
        self._moment = Moment.now(unwrap(state.model)) if self._leaves_traces else None

    def after_loss(self, state: State, weights: torch.Tensor, rehearsing: bool) -> None:
        """Replaces the loss of a microbatch by its weighted loss; in a rehearsal, for nothing but its errors.

        Args:
            state (State): On AFTER_LOSS.
            weights (torch.Tensor): The microbatch's weights, shape (n,).
            rehearsing (bool): Whether the loss stays as it is.
        """
        assert self._given is not None
        model = unwrap(state.model)
        batch = self._given.again(state.batch)
        own_loss = cast(torch.Tensor, state.loss)
        mean = own_loss.mean() if own_loss.dim() else own_loss
        with get_precision_context(state.precision, state.precision_config), back_at(model, self._moment):
            losses = per_sample_losses(model, state.outputs, batch, len(weights), self.selection_pass.loss_fn)
            scale = self._scale.read(
                losses, mean, differentiable_outputs(state.outputs), self._recomputed_loss(state, batch)
            )
            loss = weighted_loss(losses, weights, mean, scale)
        self._given = self._moment = None
        if rehearsing:
            return
        state.loss = loss
        outputs: Any = state.outputs
        if isinstance(outputs, MutableMapping) and outputs.get("loss") is own_loss:
            outputs["loss"] = own_loss.detach()  # Its graph would be kept through the backward pass.

    def _recomputed_loss(self, state: State, batch: Any) -> Iterator[torch.Tensor]:
        """A HuggingFace model's own loss from its logits: compiled, it returns one that does not depend on them."""
        model = unwrap(state.model)
        if takes_loss_from_logits(model):
            yield huggingface_losses(model, state.outputs, batch, reduction="mean")

    def end_step(self, state: State) -> None:
        """Warns of terms of the model's own loss that weights do not reach; on a GPU, not in each step."""
        step = str(int(state.timestamp.batch))
        due = state.device.name != "gpu" or step.strip("0") == "1"
        if due and self._scale.other_terms is not None and bool(self._scale.other_terms):
            self.selection_pass.warn(
                "the model's own loss has a term that depends on its outputs and is not in the samples' losses "
                "(loss_fn, or loss(..., reduction='none')). It is trained without weights."
            )
