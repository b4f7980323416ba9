"""Comparing the gradients of a captured pass with the model's own, of the same picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from composer_gradmatch.batches import copy_batch
from composer_gradmatch.forward.torch_private import tree_flatten, tree_map_only
from composer_gradmatch.reuse.capture import CapturedForward, Pass
from composer_gradmatch.reuse.loss_in_outputs import LossInOutputs
from composer_gradmatch.reuse.minibatch import Minibatch
from composer_gradmatch.reuse.model_forward import ModelForward
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError
from composer_gradmatch.reuse.verify import (
    check_gradients,
    check_outputs,
    distinct_tensors,
    picks_normalised_by_all,
    rounded_parameters,
)

__all__ = ["Losses", "Verification"]

#: The samples' losses from a model's outputs and the batch.
Losses = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Verification:
    """Compares outputs and gradients of a pass with those that the model itself makes of the same picks.

    Attributes:
        forward (ModelForward): The model's own forward.
        precision (Callable): Makes the context of the training step's precision.
        loss (LossInOutputs): The loss that the model would put into its outputs.
        minibatch (Minibatch): The minibatch of the pass.
        picks (torch.Tensor): The picked samples, int64, shape (m,), on the batch's device.
        picked (Any): Their batch.
        weights (torch.Tensor): Their weights, shape (m,).
        losses (Callable): Gives samples' losses.
    """

    forward: ModelForward
    precision: Callable[[], AbstractContextManager[Any]]
    loss: LossInOutputs
    minibatch: Minibatch
    picks: torch.Tensor
    picked: Any
    weights: torch.Tensor
    losses: Losses

    def compare(self, made: Pass) -> None:
        """Compares a pass, which has no activations afterwards; buffers and generators are as a pass leaves them.

        Where autocast to 16 bits makes them differ, as it does in deep networks, they are compared without it.

        Raises:
            UndecidedError: If nothing can be compared on this minibatch.
            UnsupportedError: If they differ.
        """
        device = self.picks.device.type
        with self.precision():
            by_autocast = torch.is_autocast_enabled(device)
        try:
            self._compare_in(self.precision, made)
            return
        except UnsupportedError as error:
            if not by_autocast or isinstance(error, UndecidedError):
                raise
        made.run.let_go_of_activations()
        self.minibatch.start.rewind()
        full = partial(torch.autocast, device, enabled=False)
        with full():
            in_full = CapturedForward(self.forward.eager)(
                self.minibatch.inputs(self.minibatch.batch), self.minibatch.num_samples
            )
        self._compare_in(full, in_full)

    def _compare_in(self, precision: Callable[[], AbstractContextManager[Any]], made: Pass) -> None:
        """Compares outputs and gradients in a precision.

        The reference is the model's forward pass on the picks, as two passes would make it; on all samples where it
        draws random numbers, which would be others on the picks alone, or where batch normalisation mixes samples.
        """
        made.run.let_go_of_inputs()
        low = made.run.in_low_precision
        graphs = made.run.graphs
        alone = not graphs.normalises and not graphs.random
        parameters = [parameter for parameter in self.forward.model.parameters() if parameter.requires_grad]

        def reference() -> Any:
            """Tells what the model itself returns, of the picks alone or of all samples."""
            self.minibatch.start.rewind()
            with nullcontext() if alone else picks_normalised_by_all(self.picks), precision():
                return self.forward.own(self.minibatch.inputs(self.picked if alone else self.minibatch.batch))

        def gradients(outputs: Any) -> Sequence[torch.Tensor | None]:
            with precision():
                picked = copy_batch(self.picked)
                each = self.losses(self.loss.complete(outputs, picked), picked)
            # As the Trainer does, outside of autocast.
            return torch.autograd.grad((each * self.weights.to(each)).sum(), parameters, allow_unused=True)

        def gradients_of_reference(outputs: Any) -> Sequence[torch.Tensor | None]:
            return gradients(outputs if alone else self._rows(outputs))

        def rounded() -> Sequence[torch.Tensor | None]:
            with rounded_parameters(parameters, low):
                return gradients_of_reference(reference())

        with torch.enable_grad():
            found = gradients(made.rows(self.picks))
            made.run.let_go_of_activations()  # Those of two forward passes need not be held at once.
            whole = reference()
            self._check_outputs(made, whole, alone)
            expected = gradients_of_reference(whole)
            del whole
            check_gradients(found, expected, low, rounded)
            if self.loss.is_put_in:
                with precision():
                    self._check_loss(made.outputs)

    def _rows(self, outputs: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda leaf: leaf.index_select(0, self.picks), outputs)

    def _check_outputs(self, made: Pass, whole: Any, alone: bool) -> None:
        """Compares the outputs with the model's own, of the picks alone or of all samples."""
        own = [leaf.detach() for leaf in distinct_tensors(tree_flatten(whole)[0])]
        captured = made.run.outputs
        if len(own) != len(captured):
            raise UnsupportedError("the model itself returns other tensors than when it is captured")
        if alone:
            mixed = "that on the picks alone: layers mix samples, or run in another way"
            check_outputs(self._rows(captured), own, mixed)
        else:
            check_outputs(captured, own)

    @torch.no_grad()
    def _check_loss(self, outputs: Any) -> None:
        """Compares the loss that is put into the outputs with the model's own."""
        self.minibatch.start.rewind()
        whole = self.forward.own(copy_batch(self.minibatch.batch))
        self.loss.check(self.loss.complete(outputs, copy_batch(self.minibatch.batch)), whole)
