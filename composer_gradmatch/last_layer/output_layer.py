"""Finding the layer that a loss goes through first, and showing that H and P give its gradients.

A layer is the output layer if what the model returns comes from its output by nothing that is learned, and H and P
give its gradients if its output is its input times its weight plus its bias.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from composer_gradmatch.batches import copy_structure, tensor_leaves
from composer_gradmatch.last_layer.tap import (
    OutputLayerTap,
    as_returned,
    cannot_find,
    first_input,
    watch_linears,
)

__all__ = [
    "CheckedTap",
    "check_output_layer",
    "learned_behind",
    "linear_fault",
    "name_of",
    "observe_output_layer",
    "returned_tensors",
    "watch_linearity",
]

#: How far a linear layer's outputs may be from what its weight says, relative to their terms: TF32 and bfloat16 round
#: each factor to 11 and 8 bits.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3}
_HALF_TOLERANCE = 5e-2
#: As many rows and columns of an output are compared, at the most.
_ROWS, _COLUMNS = 256, 4096
_OTHERS = "Or use LossBackprop or RandomBackprop, which need no output layer."


def returned_tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a model's outputs that the output layer is to be looked for in.

    Args:
        outputs (Any): What the model returned. Of a mapping with ``logits``, or a tuple of a scalar loss and logits,
            as HuggingFace's models return it without ``return_dict``, the logits; all tensors otherwise.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if isinstance(outputs, tuple) and len(outputs) > 1 and isinstance(outputs[0], torch.Tensor):
        logits = outputs[1] if outputs[0].dim() == 0 else None
    if isinstance(logits, torch.Tensor) and logits.dim() > 0:
        return [logits]
    return list(tensor_leaves(outputs))


@torch.no_grad()
def observe_output_layer(model: nn.Module, batch: Any) -> nn.Linear:
    """The linear layer that puts out what a model returns, or what it is made from by nothing learned.

    A layer's output that is returned as it is is found by one forward pass. Where what is returned is a part of an
    output, or another function of it without parameters, the graph of a second pass shows which.

    Args:
        model (nn.Module): Called on the batch; wrap in :func:`.no_trace` to leave its buffers alone.
        batch (Any): What the model takes.

    Raises:
        ValueError: If there is no such layer, or more than one.
    """
    with watch_linears(model) as calls:
        returned = returned_tensors(model(copy_structure(batch)))
    found = as_returned(calls, returned)
    applied = None
    if not found:
        with torch.enable_grad(), _watch_nodes(model) as nodes:
            returned = returned_tensors(model(copy_structure(batch)))
        found = [layer for layer, _ in nodes if _is_made_from(returned, layer, nodes)]
        if not found:
            applied = _applied_without_linear(model, returned, {node for _, node in nodes})
    if len(found) == 1:
        return found[0]
    raise ValueError(cannot_find(model, len(found)) if applied is None else applied)


@contextmanager
def _watch_nodes(model: nn.Module) -> Iterator[list[tuple[nn.Linear, Any]]]:
    """Lists each ``nn.Linear`` and the node of the graph that its output comes from, before anything changes it."""
    nodes: list[tuple[nn.Linear, Any]] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        assert isinstance(module, nn.Linear)
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            nodes.append((module, output.grad_fn))

    handles = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield nodes
    finally:
        for handle in handles:
            handle.remove()


def _is_made_from(returned: list[torch.Tensor], layer: nn.Linear, nodes: list[tuple[nn.Linear, Any]]) -> bool:
    """Whether tensors of a layer's width depend on its only output, and on nothing learned behind or beside it."""
    own = {node for called, node in nodes if called is layer}
    made = [each for each in returned if each.dim() and layer.out_features in (1, each.shape[-1])]
    made = [each for each in made if own & set(_graph(each))]
    return len(own) == 1 and bool(made) and not any(True for each in made for _ in _parameters(each, own))


def _applied_without_linear(model: nn.Module, returned: list[torch.Tensor], linears: set[Any]) -> str | None:
    """What to say of the parameter that tensors were made with last; None if an ``nn.Linear`` has it."""
    behind = [parameter for tensor in returned for parameter in _parameters(tensor, linears)]
    # Rather the matrix of a head than the scale of a norm before it, which is as near.
    last = next((parameter for parameter in behind if parameter.dim() > 1), behind[0] if behind else None)
    owners = {
        f"{prefix}.{name}".removeprefix("."): module
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter is last
    }
    if last is None or not owners or any(isinstance(owner, nn.Linear) for owner in owners.values()):
        return None
    names = " = ".join(f"{name} (of {type(owner).__name__})" for name, owner in owners.items())
    if last.dim() != 2:
        return f"{cannot_find(model, 0)} Behind their outputs, what it returns is made with the parameter {names}."
    return (
        f"Cannot find the output layer of {type(model).__name__}: what it returns is made with the parameter {names}, "
        "which no nn.Linear of the model holds (a tied head is often F.linear(x, embedding.weight)), and gradient "
        "matching needs this product to be an nn.Linear's. Give the model head = nn.Linear(..., bias=False) with "
        "head.weight = that parameter, and return head(x), which are the same numbers; the gradients of any other "
        f"layer are not those of the head. {_OTHERS}"
    )


def _graph(tensor: torch.Tensor, stop: Collection[Any] = ()) -> Iterator[Any]:
    """The nodes of a tensor's graph, the nearest first, down to those to stop at."""
    waiting = deque([tensor.grad_fn])
    seen = {tensor.grad_fn}
    while waiting:
        node = waiting.popleft()
        if node is None:
            continue
        yield node
        if node in stop:
            continue
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def _parameters(tensor: torch.Tensor, stop: Collection[Any] = ()) -> Iterator[nn.Parameter]:
    """The parameters in a tensor's graph, the nearest first, down to the nodes to stop at."""
    for node in _graph(tensor, stop):
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            yield variable


def learned_behind(losses: torch.Tensor, leaf: torch.Tensor, model: nn.Module) -> list[str]:
    """The parameters by which the losses' gradients at a layer's output are made: those behind, not before, it.

    A term of the losses that does not depend on the output (a penalty on weights) is not behind it.

    Args:
        losses (torch.Tensor): The samples' losses, with their graph from ``leaf``, where it was cut; it is kept.
        leaf (torch.Tensor): The layer's output.
        model (nn.Module): The model, for the parameters' names.

    Returns:
        list[str]: Their names, or shapes where they are none of the model's.
    """
    found = list(_parameters(losses))
    if not found:
        return []
    try:
        (grads,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True, allow_unused=True)
    except RuntimeError:
        grads = None  # An operation without second derivatives, which are not wanted: all that is found counts, then.
    # A function written in Python can hide what its gradients are made with, if it can be differentiated only once.
    opaque = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in _graph(losses))
    if grads is not None and not opaque:
        made_with = {id(parameter) for parameter in _parameters(grads)}
        found = [parameter for parameter in found if id(parameter) in made_with]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        names.get(id(parameter), f"one of shape {tuple(parameter.shape)} that is not the model's")
        for parameter in found
    ]


@contextmanager
def watch_linearity(layer: nn.Linear) -> Iterator[list[str]]:
    """Lists what is wrong with taking a layer for a linear one, as it runs while the context is open.

    Args:
        layer (nn.Linear): The layer. It is compared while it runs, when FSDP has gathered its weight.
    """
    faults: list[str] = []

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        fault = linear_fault(layer, first_input(args, kwargs), output)
        if fault is not None:
            faults.append(fault)

    handle = layer.register_forward_hook(compare, with_kwargs=True)
    try:
        yield faults
    finally:
        handle.remove()


@torch.no_grad()
def linear_fault(layer: nn.Linear, inputs: Any, output: Any) -> str | None:
    """What a layer put out that its input times its weight plus its bias is not; None if nothing.

    A forward of a subclass's own is also called with other numbers in all of the layer's parameters: adapters and
    scales start out where they change nothing. Parametrisations of the weight are taken as they are: what is matched
    is the gradient of the weight that they make. A weight that cannot be read in whole (FSDP's part of it) is trusted
    where the forward is ``nn.Linear``'s.

    Args:
        layer (nn.Linear): The layer.
        inputs (Any): What it was called on.
        output (Any): What it put out.
    """
    if not isinstance(inputs, torch.Tensor) or not isinstance(output, torch.Tensor):
        return f"it makes a {type(output).__name__} of a {type(inputs).__name__}, not a tensor of a tensor"
    if inputs.shape[-1:] != (layer.in_features,) or output.shape != (*inputs.shape[:-1], layer.out_features):
        return f"it makes an output of shape {tuple(output.shape)} of an input of shape {tuple(inputs.shape)}"
    own_forward = type(layer).forward is not nn.Linear.forward or "forward" in vars(layer)
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
    if own_forward and layer._parameters.get("weight") is layer.weight and not isinstance(layer.weight, DTensor):
        others = _other_parameters(layer)
        rows = inputs.reshape(-1, layer.in_features)[:_ROWS]
        probe = torch.func.functional_call(
            _Bare(layer), {f"layer.{name}": value for name, value in others.items()}, rows
        )
        if not isinstance(probe, torch.Tensor) or not _agree(
            rows, others["weight"], others.get("bias"), probe, _tolerance(inputs, weight, probe)
        ):
            return f"its own forward makes something else of other values of its parameters ({', '.join(others)})"
    return None


class _Bare(nn.Module):
    """Calls a layer's forward without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.layer.forward(inputs)


def _other_parameters(layer: nn.Linear) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(parameter.shape, generator=generator) / layer.in_features**0.5).to(parameter)
        for name, parameter in layer.named_parameters()
    }


def _in_whole(parameter: torch.Tensor, needed: bool) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if needed and isinstance(parameter, DTensor) else parameter


def _is_there(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers are in this process's memory: FSDP frees those that it has gathered."""
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
    """Whether output = input @ weight.T + bias in each of some rows and columns, as far as both are finite."""
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


def check_output_layer(
    model: nn.Module, layer: nn.Linear, leaf: torch.Tensor, losses: torch.Tensor, chosen: bool
) -> str | None:
    """Checks that the losses go through a layer first, and through nothing learned behind it.

    Args:
        model (nn.Module): The model, for names.
        layer (nn.Linear): The output layer.
        leaf (torch.Tensor): Its output, where the graph was cut.
        losses (torch.Tensor): The samples' losses, shape (M,), with their graph from ``leaf``, which is kept.
        chosen (bool): Whether the user named the layer.

    Returns:
        str | None: A warning, if the user named a layer that others are behind.

    Raises:
        ValueError: If the layer was found and others are behind it.
    """
    behind = learned_behind(losses, leaf, model)
    if not behind:
        return None
    name = name_of(model, layer)
    listed = ", ".join(behind[:4]) + (f" and {len(behind) - 4} more" if len(behind) > 4 else "")
    if chosen:
        return (
            f"output_layer={name} is not what the loss depends on first: behind or beside its output there are the "
            f"parameters {listed}. Its own gradient is matched, which is not the one of the model's last layer. If "
            "that is not meant, pass the nn.Linear that has these parameters, or write what has them as one."
        )
    raise ValueError(
        f"The output layer was taken for {name}, but the loss depends on other parameters first: behind or beside its "
        f"output there are {listed}. If an nn.Linear has them, pass it as output_layer; if none has (a head "
        "that is F.linear(x, weight), say), write it as an nn.Linear with this weight. To match the gradient of "
        f"{name} all the same, pass it as output_layer. {_OTHERS}"
    )


class CheckedTap(OutputLayerTap):
    """An :class:`.OutputLayerTap` that shows that H and P give the layer's gradients, and that nothing is behind it.

    Args:
        model (nn.Module): The model, for names.
        layer (nn.Linear): The output layer.
        chosen (bool): Whether the user named the layer.

    Attributes:
        warning (str, optional): What is to be said of a layer that the user named; None for nothing.
    """

    def __init__(self, model: nn.Module, layer: nn.Linear, chosen: bool) -> None:
        super().__init__(layer)
        self.model, self.chosen = model, chosen
        self.warning: str | None = None

    @contextmanager
    def open(self) -> Iterator[CheckedTap]:
        """Taps and watches the layer: see :meth:`.OutputLayerTap.open`.

        Raises:
            ValueError: If its output is not its input times its weight plus its bias.
        """
        with watch_linearity(self.layer) as faults, super().open():
            yield self
        for fault in faults:
            raise ValueError(
                f"The output layer {name_of(self.model, self.layer)}, a {type(self.layer).__name__}, does not put out "
                f"its input times its weight plus its bias: {fault}. The gradients that would be matched are not its "
                "own. Normalise and scale before or behind a plain nn.Linear (without hooks that change its output), "
                f"or pass another one as output_layer. {_OTHERS}"
            )

    def inputs_and_grads(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """H and P: see :meth:`.OutputLayerTap.inputs_and_grads`.

        Raises:
            ValueError: Also if the layer was found, and the losses go through other parameters first.
        """
        if losses.requires_grad:
            self.warning = check_output_layer(self.model, self.layer, self.leaf, losses, self.chosen)
        return super().inputs_and_grads(losses)


def name_of(model: nn.Module, layer: nn.Module) -> str:
    """A module's dotted name in a model, quoted.

    Args:
        model (nn.Module): The model.
        layer (nn.Module): One of its modules.
    """
    return next((repr(name) for name, module in model.named_modules() if module is layer), f"a {type(layer).__name__}")
