"""The output layer: finding it, seeing its inputs H and output gradients P, and the Gram matrix they give.

For m samples, an output layer with d inputs and c outputs, and losses ℓₘ: H (M×D) holds its inputs, and P
(M×C) the gradients of the *sum* of the losses with respect to its outputs, so that row m is sample m's own.
The gradient of ℓₘ with respect to the layer's weight is then pₘhₘᵀ, and to its bias pₘ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from composer_gradmatch.position_gram import position_gram

__all__ = ["OutputLayerTap", "find_output_layer", "last_layer_gram", "resolve_output_layer", "watch_linears"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def last_layer_gram(inputs: Array, output_grads: Array, bias: bool = True) -> Array:
    """The Gram matrix of the samples' last-layer gradients, K = HHᵀ∘PPᵀ + PPᵀ (eq. 4), never forming them.

    Where the layer runs at T positions of each sample, a sample's gradient is the sum over its positions,
    gᵢ = Σₜ pᵢₜhᵢₜᵀ, and Kᵢⱼ = Σₜₛ (hᵢₜ·hⱼₛ + 1)(pᵢₜ·pⱼₛ); positions whose gradient is zero cost nothing.

    Args:
        inputs (np.ndarray | torch.Tensor): H, the layer's inputs, shape (M, D) or (M, T, D).
        output_grads (np.ndarray | torch.Tensor): P, gradients of the sum of the per-sample losses with respect
            to the layer's outputs, shape (M, C) or (M, T, C).
        bias (bool, optional): Whether the layer has a bias; without one the term PPᵀ is left out.
            Default: ``True``.

    Returns:
        np.ndarray | torch.Tensor: K, shape (M, M), in the inputs' kind, device and precision. Pass float64 for a
        Gram matrix that :func:`.gram_omp` can tell duplicates from neighbours by.

    Raises:
        ValueError: If the shapes are not (M, D) and (M, C), or (M, T, D) and (M, T, C).
    """
    if inputs.ndim != output_grads.ndim or inputs.ndim not in (2, 3) or inputs.shape[:-1] != output_grads.shape[:-1]:
        raise ValueError(
            "inputs must have shape (M, D) and output_grads (M, C) with the same number of samples M, or (M, T, D) and "
            f"(M, T, C) with the same positions, too; got {tuple(inputs.shape)} and {tuple(output_grads.shape)}."
        )
    if inputs.ndim == 3:
        h, p = torch.as_tensor(inputs), torch.as_tensor(output_grads)
        kept = p.ne(0).any(-1)
        gram = position_gram(h[kept], p[kept], kept.sum(1), p.shape[-1], bias).to(h.dtype)
        return gram if isinstance(inputs, torch.Tensor) else gram.numpy()  # pyright: ignore[reportReturnType]
    products = inputs @ inputs.T
    if bias:
        products = products + 1
    return products * (output_grads @ output_grads.T)


def resolve_output_layer(model: nn.Module, output_layer: str | nn.Module) -> nn.Linear:
    """The ``nn.Linear`` of a model that a dotted name or a module stands for.

    Args:
        model (nn.Module): The model.
        output_layer (str | nn.Module): A name as in ``model.named_modules()``, or one of the model's modules.

    Raises:
        ValueError: If the model has no such module, or it is no ``nn.Linear``; the candidates are listed.
    """
    modules = dict(model.named_modules())
    if isinstance(output_layer, str):
        layer, shown = modules.get(output_layer), f"output_layer={output_layer!r}"
    else:
        layer = next((module for module in modules.values() if module is output_layer), None)
        shown = f"output_layer, a {type(output_layer).__name__},"
    if layer is None:
        raise ValueError(f"{shown} is not a module of {type(model).__name__}. {_candidates(model)}")
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{shown} must be an nn.Linear, but it is a {type(layer).__name__}. {_candidates(model)}")
    return layer


def _candidates(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        return "The model has no nn.Linear at all; gradient matching needs a linear output layer."
    return f"Its nn.Linear layers are: {', '.join(names)}."


@contextmanager
def watch_linears(model: nn.Module) -> Iterator[list[tuple[nn.Linear, torch.Tensor]]]:
    """Lists each ``nn.Linear`` and what it put out, call by call, while the context is open."""
    calls: list[tuple[nn.Linear, torch.Tensor]] = []

    def record(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        assert isinstance(module, nn.Linear)
        calls.append((module, output))

    handles = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def find_output_layer(
    model: nn.Module, calls: list[tuple[nn.Linear, torch.Tensor]], outputs: list[torch.Tensor]
) -> nn.Linear:
    """The ``nn.Linear`` that produced a model's output in one forward pass.

    Args:
        model (nn.Module): The model, for the candidates' names in an error.
        calls (list): What :func:`watch_linears` recorded.
        outputs (list[torch.Tensor]): The tensors that the model returned.

    Returns:
        nn.Linear: The layer whose output *is* one of the tensors, or shares all of its memory (a reshape).

    Raises:
        ValueError: If no ``nn.Linear`` put out what the model returns, or more than one did.
    """
    found = {id(layer): layer for layer, output in calls if any(_same_memory(output, returned) for returned in outputs)}
    if len(found) != 1:
        what = "the output of no nn.Linear" if not found else "the outputs of more than one nn.Linear"
        raise ValueError(
            f"Cannot find the output layer of {type(model).__name__}: it returns {what}. {_candidates(model)} "
            "Pass the name of the one that the loss's gradients go through first as output_layer."
        )
    return next(iter(found.values()))


def _same_memory(output: torch.Tensor, returned: torch.Tensor) -> bool:
    return output.numel() == returned.numel() and (
        output is returned or output.untyped_storage().data_ptr() == returned.untyped_storage().data_ptr()
    )


class OutputLayerTap:
    """Sees H and cuts the autograd graph at a linear layer's output during a forward pass without gradients.

    While the tap is open, the layer's output is a leaf of the autograd graph and gradients are on from there:
    whatever the model and the loss do with the output is differentiable, and no graph of the backbone is built.

    Args:
        layer (nn.Linear): The output layer.
        copy (bool, optional): Whether the model and the loss go on with a copy of the output, which they may change
            in place; without one they must not. Default: ``True``.
    """

    def __init__(self, layer: nn.Linear, copy: bool = True) -> None:
        self.layer = layer
        self.copy = copy
        self._inputs: torch.Tensor | None = None
        self._leaf: torch.Tensor | None = None

    @property
    def leaf(self) -> torch.Tensor:
        """The layer's output, a leaf of the autograd graph.

        Raises:
            ValueError: If the layer did not run.
        """
        if self._leaf is None:
            raise ValueError("The output layer did not run in the forward pass. Pass another one as output_layer.")
        return self._leaf

    def _hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if self._leaf is not None:
            raise ValueError(
                "The output layer ran more than once in a single forward pass, so its gradient is not one outer "
                "product for each sample. Pass another layer as output_layer."
            )
        self._inputs = args[0].detach()
        self._leaf = output.detach().requires_grad_()
        torch.set_grad_enabled(True)
        return self._leaf.clone() if self.copy else self._leaf

    @contextmanager
    def open(self) -> Iterator[OutputLayerTap]:
        """Taps the layer; gradients, the hook and the grad mode are as before when the context closes."""
        with torch.no_grad():
            handle = self.layer.register_forward_hook(self._hook)
            try:
                yield self
            finally:
                handle.remove()

    def inputs_and_grads(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """H and P for the samples' losses, shape (M,): (M, D) and (M, C), or (M, T, D) and (M, T, C).

        Raises:
            ValueError: If the layer did not run, the losses do not depend on its output, or it ran on another
                number of samples than there are losses.
        """
        leaf, inputs = self.leaf, self._inputs
        assert inputs is not None
        if inputs.dim() < 2 or len(inputs) != len(losses):
            raise ValueError(
                f"The output layer ran on inputs of shape {tuple(inputs.shape)} for {len(losses)} samples; expected "
                f"({len(losses)}, {self.layer.in_features}) or ({len(losses)}, positions, {self.layer.in_features}): "
                "the samples first. Pass another layer as output_layer."
            )
        if not losses.requires_grad:
            raise ValueError(
                "The per-sample losses do not depend on the output layer's output. Check loss_fn (it must not detach) "
                "and output_layer."
            )
        (grads,) = torch.autograd.grad(losses.sum(), leaf)
        return inputs, grads
