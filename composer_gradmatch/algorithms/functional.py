"""Gradient matching as one function call, without a Trainer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import torch
from torch import nn

from composer_gradmatch.forward.compiled import eagerly
from composer_gradmatch.forward.scaling import check_scale_factor, scale_inputs
from composer_gradmatch.forward.traceless import no_trace
from composer_gradmatch.last_layer import CheckedTap, last_layer_gram, observe_output_layer, resolve_output_layer
from composer_gradmatch.matching import Solver, WeightKind, check_solver, check_weight_kind
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.gradient_matching import gradient_matching
from composer_gradmatch.rules.picks import WholeBatch

__all__ = ["select_using_gradient_matching"]


def select_using_gradient_matching(
    input: torch.Tensor,
    target: torch.Tensor,
    model: nn.Module,
    loss_fun: Callable[..., torch.Tensor],
    keep: float = 0.5,
    scale_factor: float = 1.0,
    *,
    output_layer: str | nn.Module | None = None,
    solver: Solver = "omp",
    ridge: float = 0.0,
    tolerance: float = 0.0,
    weights: WeightKind = "normalized",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prunes a minibatch to the weighted samples that match its mean gradient; twin of ``select_using_loss``.

    Runs the forward pass of Algorithm 1 and leaves no trace of it in the model. For a precision other than the
    default, call it in an autocast context.

    Args:
        input (torch.Tensor): Inputs, one row for each sample.
        target (torch.Tensor): Targets, one row for each sample.
        model (nn.Module): Called on the inputs.
        loss_fun (Callable): Called as ``loss_fun(outputs, target, reduction='none')``; losses of shape (M,), or
            with further dimensions of positions, over which they are summed.
        keep (float, optional): Fraction of the samples to keep, m = max(1, int(keep·M)). Default: ``0.5``.
        scale_factor (float, optional): Scale for downsampling the inputs of this pass, in (0, 1]. Default: ``1.0``.
        output_layer (str | nn.Module, optional): The output layer; found by itself if None. Default: ``None``.
        solver (str, optional): See :func:`.gram_omp`. Default: ``"omp"``.
        ridge (float, optional): See :func:`.gram_omp`. Default: ``0.0``.
        tolerance (float, optional): See :func:`.gram_omp`. Default: ``0.0``.
        weights (str, optional): See :class:`.GradMatch`. Default: ``"normalized"``.

    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]: The picked inputs, their targets and their weights,
        which are on the inputs' device and, if normalised, sum to their number. All samples, with weights one, if
        ``keep`` is 1 or the mean gradient is zero.

    Raises:
        TypeError: If ``loss_fun`` is no function that takes ``reduction``.
        ValueError: If an argument is out of range, lengths differ, the output layer is not found or no linear one, or
            the gradients are not finite.
    """
    _check_takes_reduction(loss_fun)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}.")
    check_scale_factor(scale_factor)
    check_solver(solver, ridge, tolerance)
    check_weight_kind(weights)
    if len(input) != len(target) or not len(input):
        raise ValueError(
            f"input and target need the same number of samples, at least one; got {len(input)} and {len(target)}."
        )
    if keep == 1:
        return input, target, torch.ones(len(input), device=input.device)
    (scaled,) = scale_inputs((input,), 0, scale_factor)
    with no_trace(model), eagerly(model):
        if output_layer is None:
            layer = observe_output_layer(model, scaled)
        else:
            layer = resolve_output_layer(model, output_layer, scaled)
        with CheckedTap(model, layer, output_layer is not None).open() as tap:
            losses = loss_fun(model(scaled), target, reduction="none")
            if losses.shape[:1] != input.shape[:1]:
                raise ValueError(f"loss_fun must return one loss a sample, got shape {tuple(losses.shape)}.")
            losses = losses.flatten(1).sum(1) if losses.dim() > 1 else losses
            inputs, grads = tap.inputs_and_grads(losses)
    if tap.warning is not None:
        warnings.warn(tap.warning, stacklevel=2)
    num_picks = max(1, int(keep * len(input)))
    # On the host, where as many are picked as match.
    gram = last_layer_gram(inputs.double(), grads.double(), layer.bias is not None).cpu()
    candidates = Candidates(len(input), gram=gram)
    picks = gradient_matching(candidates, num_picks, solver=solver, ridge=ridge, tolerance=tolerance, weights=weights)
    if isinstance(picks, WholeBatch):
        return input, target, torch.ones(len(input), device=input.device)
    assert picks.weights is not None
    indices = picks.indices.to(input.device)
    return input[indices], target[indices.to(target.device)], picks.weights.float().to(input.device)


def _check_takes_reduction(loss_fun: Callable[..., torch.Tensor]) -> None:
    """Raises unless a function can be called with ``reduction='none'``, as far as its signature tells."""
    remedy = "pass a function of (outputs, target, reduction='none'), F.cross_entropy for example."
    if not callable(loss_fun):
        raise TypeError(f"loss_fun must be a function, got {type(loss_fun).__name__}: {remedy}")
    try:
        parameters = inspect.signature(loss_fun.forward if isinstance(loss_fun, nn.Module) else loss_fun).parameters
    except ValueError:
        return  # A function of C's, which tells no signature.
    if "reduction" not in parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        raise TypeError(
            f"loss_fun takes no keyword argument 'reduction', so it cannot give the loss of each sample: {remedy}"
        )
