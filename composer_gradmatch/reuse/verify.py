"""Comparing the sliced backward pass with autograd's own, of a model run as it is.

Where layers mix samples, the gradients of the picks in a whole minibatch are defined only with the layer's own
formula. For batch normalisation in training that is: with μ and σ of all M samples, x̂ = (x − μ)/σ, and the picks I
(m of them, each with S positions),

    ∂x_i = γ/σ · (∂y_i − mean_I(∂y) − x̂_i · mean_I(∂y·x̂)),

the means over the picks and their positions: the backward pass of batch normalisation over m samples, with the
statistics of all M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError

__all__ = ["check_gradients", "check_outputs", "distinct_tensors", "picks_normalised_by_all", "rounded_parameters"]

#: Of outputs relative to their norm, in single and in half precision.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-3, 5e-2
#: Of gradients in single precision. Rounding switches units of a ReLU on and off, which in a ResNet-18 with batch
#: normalisation was seen to make 0.4 % of a gradient; a tensor that is sliced wrongly makes tens of per cent.
_GRADIENT_TOLERANCE = 1e-2
#: What either may come to in a model in which rounding alone makes more.
_LARGEST_TOLERANCE, _LARGEST_PARAMETER_TOLERANCE = 0.1, 0.3
#: Of each parameter's gradient, relative to its own norm, and what rounding may make of one that is nearly zero,
#: relative to the whole gradient's.
_PARAMETER_TOLERANCE, _LOW_PRECISION_PARAMETER_TOLERANCE = 0.1, 0.5
_ROUNDING, _LOW_PRECISION_ROUNDING = 1e-4, 5e-3


def _tolerance(tensors: Sequence[torch.Tensor]) -> float:
    low = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    return _LOW_PRECISION_TOLERANCE if low else _TOLERANCE


def distinct_tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Gives the tensors among some values, each once, in their order."""
    return list({id(value): value for value in values if isinstance(value, torch.Tensor)}.values())


def check_outputs(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], reference: str = "the model's own"
) -> None:
    """Compares what the captured forward pass returned with what the model itself does.

    Args:
        found (Sequence[torch.Tensor]): The captured tensors.
        expected (Sequence[torch.Tensor]): The model's own.
        reference (str, optional): What they are, for the message. Default: ``"the model's own"``.

    Raises:
        UndecidedError: If the reference is not finite.
        UnsupportedError: If they differ by more than rounding.
    """
    for one, other in zip(found, expected, strict=True):
        error, size = (one.double() - other.double()).norm(), other.double().norm()
        if not size.isfinite():
            raise UndecidedError("the outputs that it should be compared with are not finite")
        if not error <= _tolerance([one, other]) * size:
            raise UnsupportedError(
                f"the captured forward pass differs by {float(error / size):.2g} of its norm from {reference}"
            )


def check_gradients(
    found: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor | None],
    low_precision: bool = False,
    rounded: Callable[[], Sequence[torch.Tensor | None]] | None = None,
) -> None:
    """Compares the parameters' gradients by the sliced backward pass with a reference.

    Args:
        found (Sequence[torch.Tensor | None]): By the sliced backward pass.
        expected (Sequence[torch.Tensor | None]): The reference.
        low_precision (bool, optional): Whether some of it was computed in 16 bits. Default: ``False``.
        rounded (Callable, optional): Computes the reference once more with parameters a rounding away, by which it is
            told what rounding makes where the two differ. Default: ``None``.

    Raises:
        UndecidedError: If the reference is not finite, or zero.
        UnsupportedError: If they differ by more than rounding, or the sliced ones are not finite.
    """
    error, size = _distances(found, expected)
    whole = size.norm()
    if not whole.isfinite() or not whole > 0:
        raise UndecidedError("the gradients that it should be compared with are not finite, or zero")
    tolerance = whole * (_LOW_PRECISION_TOLERANCE if low_precision else _GRADIENT_TOLERANCE)
    of_each = size * (_LOW_PRECISION_PARAMETER_TOLERANCE if low_precision else _PARAMETER_TOLERANCE)
    rounding = whole * (_LOW_PRECISION_ROUNDING if low_precision else _ROUNDING)

    def agree() -> bool:
        return bool(error.norm() <= tolerance and (error <= of_each + rounding).all())

    if not agree() and rounded is not None:
        noise, _ = _distances(rounded(), expected)
        tolerance = torch.maximum(tolerance, (3 * noise.norm()).clamp(max=_LARGEST_TOLERANCE * whole))
        of_each = torch.maximum(of_each, torch.minimum(3 * noise, _LARGEST_PARAMETER_TOLERANCE * size))
    if not agree():
        raise UnsupportedError(
            f"its gradient differs from that of the same picks by {float(error.norm() / whole):.2g} of its norm, and "
            f"a parameter's by up to {float((error / torch.maximum(size, rounding)).max()):.2g} of its own: "
            "layers mix samples, or run in another way"
        )


def _distances(
    found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds each gradient's distance from the reference, and the reference's norm, where a parameter has one."""
    errors, sizes = [], []
    for one, other in zip(found, expected, strict=True):
        if one is None and other is None:
            continue
        reference = torch.zeros_like(one) if other is None and one is not None else other
        assert reference is not None
        errors.append((reference if one is None else one - reference).norm(dtype=torch.float64).cpu())
        sizes.append(reference.norm(dtype=torch.float64).cpu())
    return torch.stack(errors), torch.stack(sizes)


@contextmanager
def rounded_parameters(parameters: Sequence[nn.Parameter], low_precision: bool = False) -> Iterator[None]:
    """Lets a model's parameters be a rounding away from their own values.

    Args:
        parameters (Sequence[nn.Parameter]): The parameters.
        low_precision (bool, optional): Whether it is the rounding of bfloat16. Default: ``False``.
    """
    own = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                eps = torch.finfo(torch.bfloat16 if low_precision else parameter.dtype).eps
                parameter.mul_(1 + eps * (torch.rand_like(parameter) - 0.5))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, own, strict=True):
                parameter.copy_(value)


class _NormalisedByAll(torch.autograd.Function):
    """Batch normalisation over all samples whose backward pass is that over the picks."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        over = [0, *range(2, inputs.dim())]
        x = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
        scale = (x.var(over, unbiased=False, keepdim=True) + eps).rsqrt()
        normal = (x - x.mean(over, keepdim=True)) * scale
        shape = [1, -1] + [1] * (inputs.dim() - 2)
        outputs = normal if weight is None else normal * weight.view(shape)
        ctx.save_for_backward(normal, scale, rows, weight)
        ctx.over, ctx.shape, ctx.has_bias = over, shape, bias is not None
        return (outputs if bias is None else outputs + bias.view(shape)).to(inputs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normal, scale, rows, weight = ctx.saved_tensors
        picked, dy = normal[rows], grads[0][rows].to(normal.dtype)
        d_weight = None if weight is None else (dy * picked).sum(ctx.over)
        d_bias = dy.sum(ctx.over) if ctx.has_bias else None
        if weight is not None:
            dy = dy * weight.view(ctx.shape)
        dx = dy - dy.mean(ctx.over, keepdim=True) - picked * (dy * picked).mean(ctx.over, keepdim=True)
        whole = torch.zeros_like(normal)
        whole[rows] = dx * scale
        return whole.to(grads[0].dtype), d_weight, d_bias, None, None


class picks_normalised_by_all(TorchFunctionMode):
    """Lets batch normalisation in training go backward by the formula of the picks ``rows``.

    It stands in for the function, not for layers: a subclass of ``nn.BatchNorm2d`` may do more than normalise. Running
    statistics are left as they are.

    Args:
        rows (torch.Tensor): The picks, int64, shape (m,), of the samples that a model runs over in the context.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self._rows = rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Normalises, or calls any other function as it is."""
        signature = _SIGNATURES.get(func)
        if signature is not None:
            given = {**_DEFAULTS, **dict(zip(signature, args, strict=False)), **(kwargs or {})}
            if given["training"]:
                return _NormalisedByAll.apply(given["input"], given["weight"], given["bias"], given["eps"], self._rows)
        return func(*args, **(kwargs or {}))


_DEFAULTS = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
_SIGNATURES: dict[Any, Sequence[str]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}
