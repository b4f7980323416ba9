"""The output layer: finding it, seeing its inputs H and output gradients P, and the Gram matrix they give.

For m samples, an output layer with d inputs and c outputs, and losses ℓₘ: H (M×D) holds its inputs, and P
(M×C) the gradients of the *sum* of the losses with respect to its outputs, so that row m is sample m's own.
The gradient of ℓₘ with respect to the layer's weight is then pₘhₘᵀ, and to its bias pₘ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from composer_gradmatch.last_layer.position_gram import position_gram

__all__ = [
    "OutputLayerTap",
    "as_returned",
    "cannot_find",
    "find_output_layer",
    "first_input",
    "last_layer_gram",
    "resolve_output_layer",
    "sample_dim",
    "watch_linears",
]

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

    def record(module: nn.Module, _: Any, output: Any) -> None:
        assert isinstance(module, nn.Linear)
        if isinstance(output, torch.Tensor):  # Which that of a subclass need not be.
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
    found = as_returned(calls, outputs)
    if len(found) != 1:
        raise ValueError(cannot_find(model, len(found)))
    return found[0]


def as_returned(calls: list[tuple[nn.Linear, torch.Tensor]], outputs: list[torch.Tensor]) -> list[nn.Linear]:
    """The layers whose output *is* one of the tensors, or shares all of its memory.

    Args:
        calls (list): What :func:`watch_linears` recorded.
        outputs (list[torch.Tensor]): The tensors that the model returned.
    """
    return list(
        {id(layer): layer for layer, output in calls if any(_same_memory(output, each) for each in outputs)}.values()
    )


def cannot_find(model: nn.Module, number: int) -> str:
    """What to say of a model of which no single output layer was found.

    Args:
        model (nn.Module): The model.
        number (int): How many were.
    """
    what = "the outputs of more than one nn.Linear" if number else "the output of no nn.Linear"
    return (
        f"Cannot find the output layer of {type(model).__name__}: it returns {what}. {_candidates(model)} "
        "Pass the name of the one that the loss's gradients go through first as output_layer."
    )


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer was called on, by position or by whatever name.

    Args:
        args (tuple): As a forward hook gets them.
        kwargs (dict): As a forward hook gets them.
    """
    return args[0] if args else next(iter(kwargs.values()), None)


def sample_dim(
    shape: tuple[int, ...], num_samples: int, grads_of: Callable[[int], torch.Tensor] | None = None
) -> int | None:
    """Which dimension of a layer's inputs or outputs is that of the samples; None if none can be.

    Args:
        shape (tuple[int, ...]): Of the inputs (M, D), (M, T, D), (T, M, D) or with further positions.
        num_samples (int): M.
        grads_of (Callable, optional): The gradient of one sample's loss at the outputs, which is not zero at the
            sample's own index only; asked where several dimensions have length M. Without it the first of them is
            taken. Default: ``None``.

    Raises:
        ValueError: If each sample's loss depends on several indices of each dimension.
    """
    candidates = [dim for dim, size in enumerate(shape[:-1]) if size == num_samples]
    if len(candidates) < 2 or grads_of is None:
        return candidates[0] if candidates else None
    # Sample 0 last: position 0 is often the only one that counts.
    for sample in [*range(1, num_samples), 0][:8]:
        grads = grads_of(sample)
        if len(candidates) == 1 or not grads.isfinite().all():
            break
        touched = grads.ne(0).any(-1)
        if touched.any():
            candidates = [
                dim
                for dim in candidates
                if touched.movedim(dim, 0).flatten(1).any(1).nonzero().flatten().tolist() == [sample]
            ]
        if not candidates:
            raise ValueError(
                f"The output layer ran on inputs of shape {tuple(shape)} for {num_samples} samples, and the loss of "
                f"sample {sample} depends on more than one index of each dimension of that length: none is the "
                "samples'. Pass another layer as output_layer."
            )
    return candidates[0]


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
        sample_dim (int, optional): Which dimension of its inputs is that of the samples, where it is known; it is
            moved to the front. Default: ``None``.
    """

    def __init__(self, layer: nn.Linear, copy: bool = True, sample_dim: int | None = None) -> None:
        self.layer = layer
        self.copy = copy
        self.sample_dim = sample_dim
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

    @property
    def outputs(self) -> torch.Tensor:
        """The layer's output without a graph, the samples first: of use after :meth:`inputs_and_grads`."""
        return self.leaf.detach().movedim(self.sample_dim or 0, 0)

    def _hook(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        if self._leaf is not None:
            raise ValueError(
                "The output layer ran more than once in a single forward pass, so its gradient is not one outer "
                "product for each sample. Pass another layer as output_layer."
            )
        self._inputs = first_input(args, kwargs).detach()
        self._leaf = output.detach().requires_grad_()
        torch.set_grad_enabled(True)
        return self._leaf.clone() if self.copy else self._leaf

    @contextmanager
    def open(self) -> Iterator[OutputLayerTap]:
        """Taps the layer; gradients, the hook and the grad mode are as before when the context closes."""
        with torch.no_grad():
            handle = self.layer.register_forward_hook(self._hook, with_kwargs=True)
            try:
                yield self
            finally:
                handle.remove()

    def inputs_and_grads(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """H and P for the samples' losses, shape (M,): (M, D) and (M, C), or (M, T, D) and (M, T, C).

        Where the layer runs with positions first, the samples' dimension is moved to the front.

        Raises:
            ValueError: If the layer did not run, the losses do not depend on its output, or it ran on another
                number of samples than there are losses.
        """
        leaf, inputs = self.leaf, self._inputs
        assert inputs is not None
        self._find_sample_dim(losses)
        grads = None
        if losses.requires_grad:
            (grads,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
        if grads is None:
            raise ValueError(
                "The per-sample losses do not depend on the output layer's output. Check loss_fn (it must not detach) "
                "and output_layer."
            )
        assert self.sample_dim is not None
        return inputs.movedim(self.sample_dim, 0), grads.movedim(self.sample_dim, 0)

    def _find_sample_dim(self, losses: torch.Tensor) -> None:
        leaf, inputs = self.leaf, self._inputs
        assert inputs is not None
        m, d = len(losses), self.layer.in_features

        def grads_of(sample: int) -> torch.Tensor:
            (grads,) = torch.autograd.grad(losses[sample], leaf, retain_graph=True, allow_unused=True)
            return torch.zeros_like(leaf) if grads is None else grads

        if self.sample_dim is None:
            self.sample_dim = sample_dim(tuple(inputs.shape), m, grads_of if losses.requires_grad else None)
        if self.sample_dim is None or self.sample_dim >= inputs.dim() - 1 or inputs.shape[self.sample_dim] != m:
            raise ValueError(
                f"The output layer ran on inputs of shape {tuple(inputs.shape)} for {m} samples; expected ({m}, {d}), "
                f"({m}, positions, {d}) or (positions, {m}, {d}), in the same order for all batches. Pass another "
                "layer as output_layer."
            )
