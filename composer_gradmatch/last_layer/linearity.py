"""Showing that H and P give a layer's gradients: its output is its input times its weight plus its bias."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from composer_gradmatch.last_layer.layers import ModuleLayer, OutputLayer

__all__ = ["linear_fault", "watch_linearity"]

#: How far a linear layer's outputs may be from what its weight says, relative to their terms: TF32 and bfloat16 round
#: each factor to 11 and 8 bits.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3}
_HALF_TOLERANCE = 5e-2
#: As many rows and columns of an output are compared, at the most.
_ROWS, _COLUMNS = 256, 4096


@contextmanager
def watch_linearity(layer: OutputLayer) -> Iterator[list[str]]:
    """Lists what is wrong with taking a layer for a linear one, as it runs while the context is open.

    Args:
        layer (OutputLayer): The layer. It is compared while it runs, when FSDP has gathered its weight.
    """
    faults: list[str] = []

    def compare(inputs: Any, output: Any) -> None:
        fault = linear_fault(layer, inputs, output)
        if fault is not None:
            faults.append(fault)

    with layer.watch(compare):
        yield faults


@torch.no_grad()
def linear_fault(layer: OutputLayer, inputs: Any, output: Any) -> str | None:
    """Tells what a layer put out that its input times its weight plus its bias is not; None if nothing.

    A forward of a subclass's own is also called with other numbers in all of the layer's parameters: adapters and
    scales start out where they change nothing. Parametrisations of the weight are taken as they are: what is matched
    is the gradient of the weight that they make. A weight that cannot be read in whole (FSDP's part of it) is trusted
    where the forward is torch's.

    Args:
        layer (OutputLayer): The layer.
        inputs (Any): What it was called on, features last.
        output (Any): What it put out, features last.
    """
    if not isinstance(inputs, torch.Tensor) or not isinstance(output, torch.Tensor):
        return f"it makes a {type(output).__name__} of a {type(inputs).__name__}, not a tensor of a tensor"
    if inputs.shape[-1:] != (layer.in_features,) or output.shape != (*inputs.shape[:-1], layer.out_features):
        return f"it makes an output of shape {tuple(output.shape)} of an input of shape {tuple(inputs.shape)}"
    own_forward = isinstance(layer, ModuleLayer) and layer.has_own_forward
    weight, bias = (
        _in_whole(layer.weight, own_forward),
        None if layer.bias is None else _in_whole(layer.bias, own_forward),
    )
    whole = weight.shape == (layer.out_features, layer.in_features) and weight.is_floating_point() and _is_there(weight)
    if not whole or not (bias is None or _is_there(bias)):
        if not own_forward:
            return None
        return f"its weight, of shape {tuple(weight.shape)} and {weight.dtype}, cannot be read to compare them"
    tolerance = _tolerance(inputs, weight, output)
    if not _agree(inputs, weight, bias, output, tolerance):
        return "it is not in this batch"
    return _fault_elsewhere(layer, inputs, weight) if isinstance(layer, ModuleLayer) and own_forward else None


def _fault_elsewhere(layer: ModuleLayer, inputs: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Tells what is wrong with a forward of a layer's own at other values of its parameters; None if nothing."""
    module = layer.module
    if module._parameters.get("weight") is not module.weight or isinstance(module.weight, DTensor):
        return None
    others = _other_parameters(layer)
    rows = inputs.reshape(-1, layer.in_features)[:_ROWS]
    probe = torch.func.functional_call(
        _Bare(module), {f"layer.{name}": value for name, value in others.items()}, layer.alone(rows)
    )
    if isinstance(probe, torch.Tensor) and probe.shape[:2] == (len(rows), layer.out_features):
        probe = probe.reshape(len(rows), layer.out_features)
        if _agree(rows, others["weight"].flatten(1), others.get("bias"), probe, _tolerance(inputs, weight, probe)):
            return None
    return f"its own forward makes something else of other values of its parameters ({', '.join(others)})"


class _Bare(nn.Module):
    """Calls a layer's forward without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.layer.forward(inputs)


def _other_parameters(layer: ModuleLayer) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(parameter.shape, generator=generator) / layer.in_features**0.5).to(parameter)
        for name, parameter in layer.module.named_parameters()
    }


def _in_whole(parameter: torch.Tensor, needed: bool) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if needed and isinstance(parameter, DTensor) else parameter


def _is_there(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor's numbers are in this process's memory: FSDP frees those that it has gathered."""
    if isinstance(tensor, DTensor) or tensor.is_meta:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _tolerance(*tensors: torch.Tensor) -> float:
    kind = tensors[0].device.type
    dtypes = {tensor.dtype for tensor in tensors}
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    return max(_TOLERANCES.get(dtype, _HALF_TOLERANCE) for dtype in dtypes)


def _agree(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor, tolerance: float
) -> bool:
    """Tells whether output = input @ weight.T + bias in each of some rows and columns, as far as both are finite."""
    inputs, output = inputs.reshape(-1, inputs.shape[-1]), output.reshape(-1, output.shape[-1])
    if output.shape != (len(inputs), len(weight)):
        return False
    rows, columns = (
        slice(None, None, max(1, -(-n // most))) for n, most in ((len(inputs), _ROWS), (len(weight), _COLUMNS))
    )
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.autocast(inputs.device.type, enabled=False):
        x, w = inputs[rows].to(wide), weight[columns].to(wide)
        b = w.new_zeros(len(w)) if bias is None else bias.detach()[columns].to(wide)
        expected = F.linear(x, w, b)
        # Of terms that are rounded at random; the sum's own rounding comes on top.
        size = F.linear(x**2, w**2, b**2).sqrt() + expected.abs()
    difference = (output[rows, columns].to(wide) - expected).abs()
    known = expected.isfinite() & output[rows, columns].isfinite()
    return bool((difference <= tolerance * size)[known].all())
