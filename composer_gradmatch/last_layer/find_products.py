"""Finding the matrix products with parameters that a model's forward pass computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from composer_gradmatch.last_layer.product import MOVES, SUMS, Product, operands

__all__ = ["watch_products"]


class _Finder(TorchFunctionMode):
    """Lists the products with parameters of a model, and what they came to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.found: list[tuple[Product, torch.Tensor, Any]] = []
        #: The modules whose forward runs, the innermost last, and the last one that each has called.
        self.stack: list[tuple[nn.Module, list[nn.Module]]] = []
        self._moved: list[tuple[Any, nn.Parameter]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function, and notes it if it is a product with a parameter."""
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        moved = self._parameter(args[0]) if function in MOVES and args else None
        if moved is not None:
            self._moved.append((output, moved))
        elif function in SUMS and len(args) > 1:
            self._note_sum(args[0], args[1], output)
        else:
            found = operands(function, args, kwargs)
            if found is not None:
                self._note_product(*found, output)
        return output

    def _parameter(self, tensor: Any) -> nn.Parameter | None:
        """Finds the parameter that a tensor is, or was moved from."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        return next((parameter for moved, parameter in self._moved if moved is tensor), None)

    def _place(self, parameter: nn.Parameter) -> tuple[nn.Module, str] | None:
        """Finds the module that has a parameter, its caller first, and its name there."""
        for module in (*(each for each, _ in reversed(self.stack)), *self.model.modules()):
            for name, own in module._parameters.items():
                if own is parameter:
                    return module, name
        return None

    def _note_product(self, inputs: Any, weight: Any, bias: Any, output: Any) -> None:
        parameter = self._parameter(weight)
        if parameter is None or parameter.dim() != 2 or not isinstance(inputs, torch.Tensor) or not self.stack:
            return
        place, width = self._place(parameter), inputs.shape[-1]
        if place is None or output.shape[:-1] != inputs.shape[:-1] or output.shape[-1] * width != parameter.numel():
            return
        transposed = parameter.shape[1] != width
        if parameter.shape[0] == parameter.shape[1]:
            weight = parameter.to(inputs)
            transposed = bool((output - inputs @ weight).norm() < (output - inputs @ weight.T).norm())
        bias_at = None if bias is None else self._place(bias) if isinstance(bias, nn.Parameter) else None
        if (bias is None) == (bias_at is None):
            caller, called = self.stack[-1]
            self._note(Product(*place, transposed, caller, called[-1] if called else None, bias_at), output)

    def _note_sum(self, one: Any, other: Any, output: Any) -> None:
        for layer, product, _ in list(self.found):
            if layer.bias is not None or not (product is one or product is other):
                continue
            bias = other if product is one else one
            place = self._place(bias) if isinstance(bias, nn.Parameter) and bias.dim() == 1 else None
            if place is not None:
                at = layer.holder, layer.attribute, layer.transposed, layer.caller, layer.after
                self._note(Product(*at, place, adds_bias=True), output)

    def _note(self, layer: Product, output: torch.Tensor) -> None:
        if layer.caller is not layer.holder or not isinstance(layer.holder, nn.Linear):  # Which is a layer itself.
            self.found.append((layer, output, output.grad_fn))


@contextmanager
def watch_products(model: nn.Module) -> Iterator[list[tuple[Product, torch.Tensor, Any]]]:
    """Lists each matrix product with a parameter of a model, what it came to, and the node of the graph of that.

    Args:
        model (nn.Module): The model, which is to be called in the context.
    """
    finder, handles = _Finder(model), []

    def enter(module: nn.Module, args: Any) -> None:
        finder.stack.append((module, []))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        finder.stack.pop()
        if finder.stack:
            finder.stack[-1][1][:] = [module]

    for module in model.modules():
        handles += [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        # What is compiled is not to be compiled once more for this.
        with torch.compiler.set_stance("force_eager"), finder:
            yield finder.found
    finally:
        for handle in handles:
            handle.remove()
