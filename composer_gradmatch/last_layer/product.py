"""An output layer that is no module's: a matrix product with a parameter, such as a language model's tied head."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from composer_gradmatch.last_layer.layers import OutputLayer, See, Watch

__all__ = ["MOVES", "SUMS", "Product", "operands"]

Tensor = torch.Tensor
#: Functions of (inputs, weight).
_PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
_TRANSPOSES: tuple[Any, ...] = (Tensor.T, Tensor.mT)
#: Functions of a tensor that give the same numbers, perhaps transposed or in another precision.
MOVES = (
    *(torch.t, Tensor.t, *(view.__get__ for view in _TRANSPOSES)),
    *(torch.transpose, Tensor.transpose, torch.permute, Tensor.permute, Tensor.contiguous),
    *(Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
)
#: Functions that add a bias to a product.
SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)


class Product(OutputLayer):
    """A matrix product with a parameter of a model, and perhaps the sum with another one.

    Args:
        holder (nn.Module): The module that has the parameter.
        attribute (str): Its name there.
        transposed (bool): Whether the parameter is Wᵀ, shape (D, C).
        caller (nn.Module): The innermost module in whose forward the product is computed.
        after (nn.Module, optional): The last module that the caller calls before it. Default: ``None``, for none.
        bias (tuple[nn.Module, str], optional): The module that has the bias, and its name there. Default: ``None``.
        adds_bias (bool, optional): Whether the bias is added by an operation of its own. Default: ``False``.
    """

    def __init__(
        self,
        holder: nn.Module,
        attribute: str,
        transposed: bool,
        caller: nn.Module,
        after: nn.Module | None = None,
        bias: tuple[nn.Module, str] | None = None,
        adds_bias: bool = False,
    ) -> None:
        self.holder, self.attribute, self.transposed = holder, attribute, transposed
        self.caller, self.after = caller, after
        self.bias_at, self.adds_bias = bias, adds_bias
        self.modules = (holder, caller, *(() if after is None else (after,)), *(() if bias is None else (bias[0],)))
        self.kind = "a matrix product with a parameter"
        self.out_features, self.in_features = self.weight.shape

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter, as its module has it now."""
        return getattr(self.holder, self.attribute)

    @property
    def weight(self) -> torch.Tensor:
        """W: see :class:`.OutputLayer`."""
        return self.parameter.T if self.transposed else self.parameter

    @property
    def bias(self) -> torch.Tensor | None:
        """b: see :class:`.OutputLayer`."""
        return None if self.bias_at is None else getattr(*self.bias_at)

    @property
    def key(self) -> tuple[Any, ...]:
        """The parameters and where they are used: see :class:`.OutputLayer`."""
        bias = None if self.bias_at is None else (id(self.bias_at[0]), self.bias_at[1])
        return id(self.holder), self.attribute, self.transposed, id(self.caller), bias, self.adds_bias

    def parameters(self) -> list[torch.Tensor]:
        """Lists the weight and the bias: see :class:`.OutputLayer`."""
        return [self.parameter] if self.bias is None else [self.parameter, self.bias]

    def name_in(self, model: nn.Module) -> str | None:
        """Finds the parameter's name: see :class:`.OutputLayer`."""
        for prefix, module in model.named_modules():
            if module is self.holder:
                return f"{prefix}.{self.attribute}".removeprefix(".")
        return None

    def is_of(self, module: nn.Module, parameter: str | None) -> bool:
        """Tells whether its weight is a module's, of that name if one is given."""
        return self.holder is module and parameter in (None, self.attribute)

    def is_part_of(self, other: Product) -> bool:
        """Tells whether another one is this and a bias."""
        return self.bias_at is None and other.adds_bias and self.key[:4] == other.key[:4]

    def watch(self, see: See, traced: bool = False, root: nn.Module | None = None) -> Watch:
        """Watches the functions that the caller's forward calls from the last module on: see :class:`.OutputLayer`."""
        return _Functions(self, see, traced, root)


def operands(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any] | None:
    """Finds the inputs, the weight and the bias of a function that is a product of rows with a weight; else None."""
    if function in _PRODUCTS:
        named = [kwargs[name] for name in ("input", "weight", "mat2", "other", "bias") if name in kwargs]
        found = [*args, *named]
        return (found[0], found[1], found[2] if len(found) > 2 else None) if len(found) > 1 else None
    if function in (torch.addmm, Tensor.addmm):
        scaled = any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
        return (args[1], args[2], args[0]) if len(args) == 3 and not scaled else None
    if function is torch.einsum and len(args) == 3 and isinstance(args[0], str):
        # Of rows (..., d) and a matrix of d and c, in either order, to (..., c).
        form = re.fullmatch(r"([\w.]*)(\w),(\w)(\w)->([\w.]*)(\w)", args[0].replace(" ", ""))
        if form is not None and form[1] == form[5] and {form[3], form[4]} == {form[2], form[6]} and form[2] != form[6]:
            return args[1], args[2], None
    return None


class _Functions(Watch):
    """Sees a product by a mode in the last part of its caller's forward, since each function takes longer in it."""

    def __init__(self, layer: Product, see: See, traced: bool, root: nn.Module | None) -> None:
        self._layer, self._mode, self._traced = layer, _Shown(layer, see), traced
        self._is_of_root = layer.caller is root
        self._handles: list[Any] = []
        self._is_on = False

    def open(self) -> None:
        """Begins to watch."""
        caller, after, self._is_on = self._layer.caller, self._layer.after, False
        self._handles = [
            caller.register_forward_pre_hook(self._begin)
            if after is None
            else after.register_forward_hook(self._begin_after),
            # Dynamo's guards have the number of a hook that is always called, which is another one each time.
            caller.register_forward_hook(self._end, always_call=not self._traced),
        ]

    def close(self) -> None:
        """Ends it, and the mode of a pass that an error has ended."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.end_pass()

    def begin_pass(self) -> None:
        """Does what the hook of the root would: see :class:`.Watch`."""
        if self._is_of_root and self._layer.after is None:
            self._begin(self._layer.caller, ())

    def end_pass(self) -> None:
        """Does what the hook of the root would: see :class:`.Watch`."""
        if self._is_on:
            self._is_on = False
            self._mode.__exit__(None, None, None)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not self._is_on:
            self._is_on = True
            self._mode.begin()
            self._mode.__enter__()

    def _begin_after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._begin(module, args)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.end_pass()


class _Shown(TorchFunctionMode):
    """Shows a product, and puts what is made of it in its place."""

    def __init__(self, layer: Product, see: See) -> None:
        super().__init__()
        self.layer, self.see = layer, see
        self.begin()

    def begin(self) -> None:
        """Forgets another pass, and takes the parameter as it is now."""
        self._weights: list[Any] = [self.layer.parameter]
        #: The last product's inputs and output, to which the bias is yet to be added.
        self._last: tuple[Any, Any] | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function, and shows it if it is the product."""
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if self._last is not None and any(each is self._last[1] for each in args):
            inputs, self._last = self._last[0], None
            if function in SUMS and any(each is self.layer.bias for each in args):
                return self._show(inputs, output)
        # Looked at first, since few functions take the weight.
        if not any(each is weight for each in (*args, *kwargs.values()) for weight in self._weights):
            return output
        if (len(args) == 1 and not kwargs) or function in MOVES:  # TorchDynamo does not know Tensor.T again.
            self._weights.append(output)
            return output
        found = operands(function, args, kwargs)
        if found is None or not any(found[1] is each for each in self._weights):
            return output
        if self.layer.adds_bias:
            self._last = found[0], output
            return output
        return self._show(found[0], output)

    def _show(self, inputs: Any, output: Any) -> Any:
        changed = self.see(inputs, output)
        return output if changed is None else changed
