"""What an output layer is: a weight that multiplies its inputs at each position; a linear layer, a convolution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn

__all__ = [
    "LinearLayer",
    "ModuleLayer",
    "OutputLayer",
    "PointwiseConvolution",
    "See",
    "Watch",
    "convolution_fault",
    "is_pointwise",
]

#: Called on a layer's inputs (..., D) and outputs (..., C) as it runs; returns what is to stand for the outputs, or
#: None to leave them.
See = Callable[[Any, Any], "torch.Tensor | None"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Watch(ABC):
    """Sees an output layer while it is open, each time that the layer runs."""

    @abstractmethod
    def open(self) -> None:
        """Begins to watch."""

    @abstractmethod
    def close(self) -> None:
        """Ends it; does nothing if it has not begun."""

    @abstractmethod
    def begin_pass(self) -> None:
        """Is told of a traced forward pass before it, since hooks of the module whose forward it is do not run."""

    @abstractmethod
    def end_pass(self) -> None:
        """Is told of it after it."""

    def __enter__(self) -> Watch:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OutputLayer(ABC):
    """A weight W (C×D) and a bias b, with which a part of a model computes z = Wh + b of rows h.

    Attributes:
        modules (tuple[nn.Module, ...]): The modules that it is a part of: if one is replaced, it is gone.
        kind (str): What it is, for messages.
        in_features (int): D.
        out_features (int): C.
    """

    modules: tuple[nn.Module, ...]
    kind: str
    in_features: int
    out_features: int

    @property
    @abstractmethod
    def weight(self) -> torch.Tensor:
        """W, shape (C, D): a view of the parameter, as it is now."""

    @property
    @abstractmethod
    def bias(self) -> torch.Tensor | None:
        """b, shape (C,); None if there is none."""

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""

    @abstractmethod
    def parameters(self) -> list[torch.Tensor]:
        """Lists the parameters that its weight and bias are, as they are now."""

    @abstractmethod
    def name_in(self, model: nn.Module) -> str | None:
        """Finds its dotted name in a model."""

    @abstractmethod
    def watch(self, see: See, traced: bool = False, root: nn.Module | None = None) -> Watch:
        """Makes what calls ``see`` whenever the layer runs.

        Args:
            see (Callable): Given the inputs (..., D) and outputs (..., C).
            traced (bool, optional): Whether TorchDynamo traces the pass. Then hooks are such that it need not trace it
                anew whenever they are registered, and see layers only that are called by position. Default: ``False``.
            root (nn.Module, optional): The module whose forward is traced, as a function, so that its hooks do not
                run; :meth:`Watch.begin_pass` and :meth:`Watch.end_pass` are called. Default: ``None``.
        """

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gives inputs or outputs, as the model has them, with features last: a view."""
        return tensor

    def as_in_model(self, rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Gives what :meth:`rows` was given, of that shape: a view."""
        return rows

    def rows_of_outputs(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Gives all numbers of the layer's outputs, which the model has returned, as rows of that shape (..., C)."""
        return tensor.reshape(shape)

    def makes(self, shape: torch.Size) -> bool:
        """Tells whether a tensor of that shape can be a function of its outputs."""
        return len(shape) > 0 and self.out_features in (1, shape[-1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OutputLayer) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class ModuleLayer(OutputLayer):
    """A layer that a module is, on its own.

    Args:
        module (nn.Module): The module, with a weight and perhaps a bias.
        of (type): Torch's class that it is of, or of a subclass of.
    """

    module: Any

    def __init__(self, module: nn.Module, of: type[nn.Module]) -> None:
        self.module, self.modules, self.kind = module, (module,), f"a {type(module).__name__}"
        self._of = of

    @property
    def bias(self) -> torch.Tensor | None:
        """b: see :class:`OutputLayer`."""
        return self.module.bias

    @property
    def key(self) -> tuple[Any, ...]:
        """The module: see :class:`OutputLayer`."""
        return (id(self.module),)

    @property
    def has_own_forward(self) -> bool:
        """Whether a subclass, or the user, has written the module's forward."""
        return type(self.module).forward is not self._of.forward or "forward" in vars(self.module)

    def parameters(self) -> list[torch.Tensor]:
        """Lists all of the module's: see :class:`OutputLayer`."""
        return list(self.module.parameters())

    def name_in(self, model: nn.Module) -> str | None:
        """Finds the module's name: see :class:`OutputLayer`."""
        return next((name for name, module in model.named_modules() if module is self.module), None)

    def alone(self, rows: torch.Tensor) -> torch.Tensor:
        """Gives rows (n, D) as the module takes n samples of one position."""
        return rows

    def watch(self, see: See, traced: bool = False, root: nn.Module | None = None) -> Watch:
        """Watches the module's calls: see :class:`OutputLayer`."""
        return _Calls(self, see, traced)


class LinearLayer(ModuleLayer):
    """An ``nn.Linear``.

    Args:
        module (nn.Linear): The module.
    """

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module, nn.Linear)
        self.in_features, self.out_features = module.in_features, module.out_features

    @property
    def weight(self) -> torch.Tensor:
        """W: see :class:`OutputLayer`."""
        return self.module.weight


class PointwiseConvolution(ModuleLayer):
    """A convolution whose kernel has one element: the same linear layer at each position.

    Where there is but one position, its rows are one for each sample, as a linear layer's.

    Args:
        module (nn.Module): An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` without a :func:`convolution_fault`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, next(kind for kind in _CONVOLUTIONS if isinstance(module, kind)))
        self.in_features, self.out_features = self.module.in_channels, self.module.out_channels
        self._num_dims = 2 + len(self.module.kernel_size)

    @property
    def weight(self) -> torch.Tensor:
        """W: see :class:`OutputLayer`."""
        weight = self.module.weight
        return weight.flatten(1) if weight.dim() > 2 else weight  # Of which FSDP may have a part.

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Moves channels to the end: see :class:`OutputLayer`.

        Raises:
            ValueError: If it is one sample, without a dimension of samples.
        """
        if tensor.dim() != self._num_dims:
            raise ValueError(
                f"The output layer, {self.kind}, ran on inputs or outputs of shape {tuple(tensor.shape)}; expected "
                f"{self._num_dims} dimensions, the samples' first. Give it a batch."
            )
        return tensor.flatten(1) if prod(tensor.shape[2:]) == 1 else tensor.movedim(1, -1)

    def alone(self, rows: torch.Tensor) -> torch.Tensor:
        """Gives rows a kernel's dimensions: see :class:`ModuleLayer`."""
        return rows.reshape(*rows.shape, *self.module.kernel_size)

    def as_in_model(self, rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Moves channels back: see :class:`OutputLayer`."""
        return rows.reshape(shape) if rows.dim() == 2 else rows.movedim(-1, 1)

    def rows_of_outputs(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Moves channels to the end: see :class:`OutputLayer`."""
        return tensor.reshape(shape[0], shape[-1], *shape[1:-1]).movedim(1, -1)

    def makes(self, shape: torch.Size) -> bool:
        """Looks for the channels anywhere: see :class:`OutputLayer`."""
        return len(shape) > 0 and (self.out_features == 1 or self.out_features in shape)


def convolution_fault(module: nn.Module) -> str | None:
    """Tells why a convolution is no linear layer at each position; None if it is, or is none of torch's.

    Args:
        module (nn.Module): A module.
    """
    if not isinstance(module, _CONVOLUTIONS):
        return None
    conv: Any = module
    ones = (1,) * len(conv.kernel_size)
    if conv.kernel_size != ones:
        return f"its kernel is {'×'.join(map(str, conv.kernel_size))}"
    if conv.stride != ones:
        return f"its stride is {'×'.join(map(str, conv.stride))}"
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if not isinstance(conv.padding, str) and any(conv.padding):
        return f"it pads its inputs by {'×'.join(map(str, conv.padding))}"
    return None


def is_pointwise(module: nn.Module) -> bool:
    """Tells whether a module is a convolution that is a linear layer at each position."""
    return isinstance(module, _CONVOLUTIONS) and convolution_fault(module) is None


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Finds what a layer was called on, by position or by whatever name.

    Args:
        args (tuple): As a forward hook gets them.
        kwargs (dict): As a forward hook gets them.
    """
    return args[0] if args else next(iter(kwargs.values()), None)


class _Calls(Watch):
    """Sees a module's calls by a forward hook."""

    def __init__(self, layer: ModuleLayer, see: See, traced: bool) -> None:
        self.layer, self.see, self.traced = layer, see, traced
        self._handle: Any = None

    def open(self) -> None:
        """Begins to watch."""
        # Dynamo's guards have the number of a hook that takes keywords, which is another one each time.
        if self.traced:
            self._handle = self.layer.module.register_forward_hook(self._traced)
        else:
            self._handle = self.layer.module.register_forward_hook(self._hook, with_kwargs=True)

    def close(self) -> None:
        """Ends it."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def begin_pass(self) -> None:
        """Does nothing: the layer is a module that the root calls."""

    def end_pass(self) -> None:
        """Does nothing, either."""

    def _traced(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._hook(module, args, {}, output)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        inputs = first_input(args, kwargs)
        changed = self.see(self.layer.rows(inputs), self.layer.rows(output))
        return None if changed is None else self.layer.as_in_model(changed, output.shape)
