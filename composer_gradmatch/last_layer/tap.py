"""Seeing an output layer's inputs H and output gradients P in a forward pass; :mod:`.gram` says what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from composer_gradmatch.last_layer.layers import OutputLayer

__all__ = ["OutputLayerTap", "sample_dim"]


def sample_dim(
    shape: tuple[int, ...], num_samples: int, grads_of: Callable[[int], torch.Tensor] | None = None
) -> int | None:
    """Finds which dimension of a layer's inputs or outputs is that of the samples; None if none can be.

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


class OutputLayerTap:
    """Sees H and cuts the autograd graph at a linear layer's output during a forward pass without gradients.

    While the tap is open, the layer's output is a leaf of the autograd graph and gradients are on from there:
    whatever the model and the loss do with the output is differentiable, and no graph of the backbone is built.

    Args:
        layer (OutputLayer): The output layer.
        copy (bool, optional): Whether the model and the loss go on with a copy of the output, which they may change
            in place; without one they must not. Default: ``True``.
        sample_dim (int, optional): Which dimension of its inputs is that of the samples, where it is known; it is
            moved to the front. Default: ``None``.
    """

    def __init__(self, layer: OutputLayer, copy: bool = True, sample_dim: int | None = None) -> None:
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

    def _see(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self._leaf is not None:
            raise ValueError(
                "The output layer ran more than once in a single forward pass, so its gradient is not one outer "
                "product for each sample. Pass another layer as output_layer."
            )
        self._inputs = inputs.detach()
        self._leaf = output.detach().requires_grad_()
        torch.set_grad_enabled(True)
        return self._leaf.clone() if self.copy else self._leaf

    @contextmanager
    def open(self) -> Iterator[OutputLayerTap]:
        """Taps the layer; gradients, the hook and the grad mode are as before when the context closes."""
        with torch.no_grad(), self.layer.watch(self._see):
            yield self

    def inputs_and_grads(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes H and P for the samples' losses, shape (M,): (M, D) and (M, C), or (M, T, D) and (M, T, C).

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
