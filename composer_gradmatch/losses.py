"""Per-sample losses of a ComposerModel's outputs, and the weighted loss made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from composer_gradmatch.huggingface_losses import check_labels, huggingface_losses, is_huggingface

__all__ = [
    "LossFn",
    "check_batch",
    "check_losses",
    "check_unit_weights",
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


def takes_loss_from_logits(model: Any) -> bool:
    """Whether a model's own loss comes reduced only, but its task says what it is made of."""
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
    """The loss of each sample: from ``loss_fn``, else ``model.loss(outputs, batch, reduction='none')``.

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
            if "reduction" not in str(error):
                raise
            raise TypeError(f"{source} failed: {error}. {_REMEDY}") from error
    if not isinstance(losses, torch.Tensor) or losses.dim() == 0 or len(losses) != num_samples:
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise ValueError(f"{source} must return one loss for each of the {num_samples} samples; got {got}. {_REMEDY}")
    return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


def weighted_loss(losses: torch.Tensor, weights: torch.Tensor, own_loss: torch.Tensor) -> torch.Tensor:
    """Weighs the samples' losses, scaled such that with unit weights it is the model's own loss.

    That is Σᵢwᵢℓᵢ/Z, with Z what the model's own reduction divides the sum of the losses by: the number of
    samples for a mean, the number of labelled positions or the sum of class weights for other losses.

    Args:
        losses (torch.Tensor): ℓ, shape (n,), with their graph.
        weights (torch.Tensor): w, shape (n,).
        own_loss (torch.Tensor): The model's own, unweighted loss of the same samples, one number.

    Returns:
        torch.Tensor: The weighted loss, a scalar.
    """
    total = losses.detach().sum()
    # Losses that are all zero say nothing about Z; the mean is the commonest reduction.
    scale = torch.where(total == 0, 1 / len(losses), own_loss.detach().mean() / total)
    return (weights.to(losses) * losses).sum() * scale


def check_unit_weights(losses: torch.Tensor, own_loss: Any, leaf: torch.Tensor) -> None:
    """Checks that with unit weights the gradient of the weighted loss is that of the model's own loss.

    Args:
        losses (torch.Tensor): The samples' losses, shape (M,), with their graph from ``leaf``.
        own_loss (torch.Tensor): The model's own loss of the same samples, with its graph from ``leaf``.
        leaf (torch.Tensor): The output layer's output.

    Raises:
        TypeError: If the model's own loss is not one tensor.
        ValueError: If the gradients differ.
    """
    if not isinstance(own_loss, torch.Tensor):
        raise TypeError(
            f"The model's loss must be one tensor for its samples to be weighted, got {type(own_loss).__name__}. "
            "Return the total as a tensor and log the parts as metrics."
        )
    unit = weighted_loss(losses, torch.ones_like(losses), own_loss)
    (own_grad,) = torch.autograd.grad(own_loss.mean(), leaf, retain_graph=True)
    (unit_grad,) = torch.autograd.grad(unit, leaf, retain_graph=True)
    if not (own_grad.isfinite().all() and unit_grad.isfinite().all()):
        return  # Says nothing about the functions; such a batch is trained whole.
    tolerance = 1e-4 if leaf.dtype in (torch.float32, torch.float64) else 1e-2
    wide = torch.promote_types(own_grad.dtype, torch.float32)
    norm, error = own_grad.norm(dtype=wide), (own_grad - unit_grad).norm(dtype=wide)
    if error > tolerance * norm:
        raise ValueError(
            "The per-sample losses do not add up to the model's own loss: with all weights one, the gradient at the "
            f"output layer is off by {error / norm:.2g} of its norm, so selection would train "
            "on another objective. Check that loss_fn (or loss(..., reduction='none')) is the model's loss before "
            "reduction, with the same terms."
        )
