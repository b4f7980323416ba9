"""Per-sample losses of a ComposerModel's outputs, and the weighted loss made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from composer_gradmatch.batches import tensor_leaves
from composer_gradmatch.forward.huggingface_losses import check_labels, huggingface_losses, is_huggingface
from composer_gradmatch.forward.loss_scale import LossScale, gradients_at, is_low

__all__ = [
    "LossFn",
    "check_batch",
    "check_losses",
    "check_objective",
    "differentiable_outputs",
    "per_sample_losses",
    "takes_loss_from_logits",
    "weighted_loss",
]

#: The losses of each sample, shape (M,), from a model's outputs and the batch.
LossFn = Callable[[Any, Any], torch.Tensor]

_REMEDY = (
    "Pass loss_fn=..., a function of (outputs, batch) that returns the loss of each sample, shape (M,), for example "
    "loss_fn=lambda outputs, batch: F.cross_entropy(outputs, batch[1], reduction='none')."
)


def _takes_reduction(model: Any) -> bool:
    parameters = inspect.signature(model.loss).parameters
    return "reduction" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _refuses_reduction(error: TypeError) -> bool:
    """Tells whether Python says of a function that it cannot be called with the argument ``reduction``."""
    return "reduction" in str(error)


def takes_loss_from_logits(model: Any) -> bool:
    """Tells whether a model's own loss comes reduced only, but its task says what it is made of."""
    return is_huggingface(model) and not _takes_reduction(model)


def check_losses(model: Any) -> None:
    """Checks that the losses of a model's samples are to be had, as far as can be told without a batch.

    Args:
        model (ComposerModel): The model.

    Raises:
        TypeError: If its ``loss`` has neither a parameter ``reduction`` nor ``**kwargs``, and it is no
            ``HuggingFaceModel``.
    """
    if not (_takes_reduction(model) or is_huggingface(model)):
        raise TypeError(
            f"{type(model).__name__}.loss takes no keyword argument 'reduction', so it cannot give the loss of each "
            f"sample. {_REMEDY}"
        )


def check_batch(model: Any, batch: Any, loss_fn: LossFn | None = None) -> None:
    """Checks a batch's labels as far as the model tells what they are: see :func:`.check_labels`.

    Args:
        model (ComposerModel): The model.
        batch (Any): The batch.
        loss_fn (Callable, optional): What gives the losses in the model's place. Default: ``None``.

    Raises:
        ValueError: If the labels of a ``HuggingFaceModel``'s batch cannot be trained on.
    """
    if loss_fn is None and takes_loss_from_logits(model):
        check_labels(model, batch)


def per_sample_losses(
    model: Any, outputs: Any, batch: Any, num_samples: int, loss_fn: LossFn | None = None
) -> torch.Tensor:
    """Computes the loss of each sample: from ``loss_fn``, else ``model.loss(outputs, batch, reduction='none')``.

    A ``HuggingFaceModel`` whose ``loss`` takes no ``reduction`` gets :func:`.huggingface_losses`.

    Losses with further dimensions (of positions, say) are summed over them: what matters is that they are in
    proportion to each sample's part in the model's own loss.

    Args:
        model (ComposerModel): The model whose ``loss`` is asked.
        outputs (Any): What its ``forward`` returned.
        batch (Any): The batch.
        num_samples (int): M.
        loss_fn (Callable, optional): A function of (outputs, batch) to use instead. Default: ``None``.

    Returns:
        torch.Tensor: The losses, shape (M,).

    Raises:
        TypeError: If the model's loss takes no ``reduction``.
        ValueError: If what comes back is not one row for each sample.
    """
    if loss_fn is not None:
        losses = loss_fn(outputs, batch)
        if not isinstance(losses, torch.Tensor) or losses.shape != (num_samples,):
            got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(f"loss_fn must return a tensor of shape ({num_samples},), one loss a sample; got {got}.")
        return losses
    if takes_loss_from_logits(model):
        source = f"The loss of {type(model.model).__name__}"
        losses = huggingface_losses(model, outputs, batch)
    else:
        source = f"{type(model).__name__}.loss(outputs, batch, reduction='none')"
        try:
            losses = model.loss(outputs, batch, reduction="none")
        except TypeError as error:
            if not _refuses_reduction(error):
                raise
            raise TypeError(f"{source} failed: {error}. {_REMEDY}") from error
    if not isinstance(losses, torch.Tensor) or losses.dim() == 0 or len(losses) != num_samples:
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise ValueError(f"{source} must return one loss for each of the {num_samples} samples; got {got}. {_REMEDY}")
    return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


def differentiable_outputs(outputs: Any) -> list[torch.Tensor]:
    """Finds the tensors of a model's outputs that samples' losses can be traced back to.

    Args:
        outputs (Any): What a forward pass returned; of a HuggingFace model, only its logits are looked at.

    Returns:
        list[torch.Tensor]: Those with a graph and a row for each sample.
    """
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), torch.Tensor):
        outputs = outputs["logits"]
    return [leaf for leaf in tensor_leaves(outputs) if leaf.requires_grad and leaf.dim()]


def weighted_loss(
    losses: torch.Tensor, weights: torch.Tensor, own_loss: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """Weighs the samples' part of a model's own loss, and leaves its other terms as they are.

    With L = (1/Z)·Σᵢℓᵢ + R, that is L + (1/Z)·Σᵢ(wᵢ − 1)ℓᵢ = (1/Z)·Σᵢwᵢℓᵢ + R: the model's own loss where all weights
    are one.

    Args:
        losses (torch.Tensor): ℓ, shape (n,), with their graph.
        weights (torch.Tensor): w, shape (n,).
        own_loss (torch.Tensor): L, the model's own, unweighted loss of the same samples, a scalar with its graph.
        scale (torch.Tensor | float): 1/Z, as :class:`.LossScale` reads it.

    Returns:
        torch.Tensor: The weighted loss, a scalar.
    """
    more = (weights.to(losses) - 1) * scale * losses
    return own_loss + more.sum().to(own_loss.dtype)


def check_objective(losses: torch.Tensor, own_loss: Any, points: Sequence[torch.Tensor], scale: LossScale) -> None:
    """Checks that at the outputs the gradient of the model's own loss is a multiple of that of its samples'.

    Args:
        losses (torch.Tensor): The samples' losses, shape (M,), with their graph from the points.
        own_loss (torch.Tensor): The model's own loss of the same samples, with its graph from the points.
        points (Sequence[torch.Tensor]): The output layer's output, or what the model returns.
        scale (LossScale): Learns the multiple.

    Raises:
        TypeError: If the model's own loss is not one tensor.
        ValueError: If the gradients are no multiples of one another.
    """
    if not isinstance(own_loss, torch.Tensor):
        raise TypeError(
            f"The model's loss must be one tensor for its samples to be weighted, got {type(own_loss).__name__}. "
            "Return the total as a tensor and log the parts as metrics."
        )
    found = gradients_at(points, losses, own_loss.mean())
    if found is None:
        raise ValueError(
            "The model's own loss does not depend on the output layer's output. Check that its forward pass or its "
            "loss does not detach it, or pass another output_layer."
        )
    if not all(bool(grad.isfinite().all()) for grads in found for grad in grads):
        return  # Says nothing about the functions; such a batch is trained whole.
    factor = float(scale.read(losses, own_loss.mean(), points, trusted=True))
    norm, error = _norm(found[1]), _norm([own - factor * each for each, own in zip(*map(_widened, found), strict=True)])
    if error > (2e-2 if any(map(is_low, points)) else 2e-4) * norm:
        raise ValueError(
            "The per-sample losses do not add up to the model's own loss: no multiple of the gradient of their sum is "
            f"the model's own at the output layer; the nearest is off by {error / norm:.2g} of its norm, so selection "
            "would train on another objective. Check that loss_fn (or loss(..., reduction='none')) is the model's loss "
            "before reduction, with the same terms."
        )


def _widened(grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]


def _norm(grads: Sequence[torch.Tensor]) -> float:
    """Gives the norm of all of them together."""
    return float(torch.stack([grad.norm().double() for grad in _widened(grads)]).norm())
