"""The gradient of each sample of a minibatch, formed explicitly, and what a rule sees of the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from composer_gradmatch.batches import copy_batch, count_samples, take_samples
from composer_gradmatch.batches.labels import class_labels
from composer_gradmatch.forward.losses import per_sample_losses
from composer_gradmatch.last_layer import CheckedTap, observe_output_layer, resolve_output_layer
from composer_gradmatch.rules.candidates import Candidates

__all__ = ["SampleGradients"]

#: How far the mean of the samples' gradients may be from the gradient of the minibatch's loss, relative to their norms
#: (of which a mean that is close to zero has only their rounding).
_TOLERANCE = 1e-3


class SampleGradients:
    """Forms per-sample gradients by a backward pass of each sample alone, in evaluation mode.

    Args:
        model (ComposerModel): The model; it is put into evaluation mode, in which BatchNorm normalises by its running
            statistics, so that samples do not depend on one another.
        batch (Any): A batch of M samples, on the model's device, to find the output layer and to check the gradients.
        keys (tuple[Any, Any], optional): ``input_key`` and ``target_key``. Default: ``(0, 1)``.
        output_layer (str, optional): Its dotted name; found by itself if None. Default: ``None``.

    Attributes:
        in_last_layer (torch.Tensor): Which of the P numbers of a gradient are the output layer's, shape (P,).

    Raises:
        ValueError: If the output layer is not found, or the mean of the samples' gradients is not the gradient of the
            model's own loss on the minibatch.
    """

    def __init__(self, model: Any, batch: Any, keys: tuple[Any, Any] = (0, 1), output_layer: str | None = None) -> None:
        self.model, self.keys = model.eval(), keys
        self.chosen = output_layer is not None
        if output_layer is None:
            self.layer = observe_output_layer(model, batch)
        else:
            self.layer = resolve_output_layer(model, output_layer, batch)
        self.parameters: list[nn.Parameter] = [each for each in model.parameters() if each.requires_grad]
        own = {id(each) for each in self.layer.parameters()}
        self.in_last_layer = torch.cat([torch.full((each.numel(),), id(each) in own) for each in self.parameters])
        whole, rows = self._gradient(batch), self.gradients(batch)
        error, norm = float((rows.mean(0) - whole).norm()), float(rows.square().sum(1).mean().sqrt())
        if not error <= _TOLERANCE * norm:
            raise ValueError(
                f"The mean of the samples' gradients, each by itself in evaluation mode, differs from the gradient of "
                f"the model's loss on the minibatch by {error:.2g}, where samples have a norm of {norm:.2g}; expected "
                "no difference. Samples depend on one another in this model, or its loss is no mean over samples: what "
                "a rule's error is made of cannot be told. Use --against data."
            )

    def gradients(self, batch: Any) -> torch.Tensor:
        """Forms the samples' gradients over all trainable parameters, shape (M, P), float64."""
        num_samples = count_samples(batch, *self.keys)
        rows = torch.empty(num_samples, len(self.in_last_layer), dtype=torch.float64)
        for i in range(num_samples):
            rows[i] = self._gradient(take_samples(batch, torch.tensor([i]), num_samples))
        if not rows.isfinite().all():
            raise RuntimeError("A sample's gradient is not finite. Look at the model's loss at these weights first.")
        return rows

    def candidates(self, batch: Any) -> Candidates:
        """Looks at the samples' losses, H, P and labels, as a selection pass in evaluation mode would; on the host.

        Raises:
            ValueError: If the output layer runs at several positions of a sample.
        """
        num_samples = count_samples(batch, *self.keys)
        with CheckedTap(self.model, self.layer, self.chosen).open() as tap:
            held = copy_batch(batch)
            losses = per_sample_losses(self.model, self.model(held), held, num_samples)
            inputs, output_grads = tap.inputs_and_grads(losses)
        if inputs.dim() > 2:
            raise ValueError(
                f"The output layer runs at positions (its inputs have the shape {tuple(inputs.shape)}); expected one "
                "row for each sample. Use --against data."
            )
        return Candidates(
            num_samples,
            losses=losses.detach().cpu(),
            inputs=inputs.cpu(),
            output_grads=output_grads.cpu(),
            bias=self.layer.bias is not None,
            labels=lambda: class_labels(batch, self.keys[1], num_samples).cpu(),
        )

    def _gradient(self, batch: Any) -> torch.Tensor:
        """Gives the gradient of the model's own loss, shape (P,), float64, on the host."""
        held = copy_batch(batch)
        loss = self.model.loss(self.model(held), held)
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"The model's loss must be one tensor, got {type(loss).__name__}. Use --against data.")
        grads = torch.autograd.grad(loss.mean(), self.parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten().double() for grad in grads]).cpu()
