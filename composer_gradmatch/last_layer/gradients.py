"""H and P of a minibatch, gathered from the microbatches of its selection pass, and their Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from composer_gradmatch.last_layer.gram import last_layer_gram
from composer_gradmatch.last_layer.layers import OutputLayer
from composer_gradmatch.last_layer.position_gram import SoftmaxGrads, position_gram

__all__ = ["STORED_BYTES", "LayerGradients", "all_finite", "all_grads", "all_inputs", "gram_of_all", "joined"]

#: The most memory for all of P as it is: above, P of a softmax cross-entropy is kept as what computes it again
#: (unless FSDP has the layer's weight in parts, or the loss is another one: then all of P is kept).
STORED_BYTES = 64 * 2**20


def all_finite(values: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    """Tells whether all numbers are finite, a boolean scalar: by their sum, in a precision in which it is then, too."""
    total = values.sum(dtype=torch.float64)
    for each in more:
        total = total + each.sum(dtype=torch.float64)
    return total.isfinite()


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Puts parts of a minibatch together; of one there is nothing to copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class LayerGradients:
    """Some samples' rows of H and P; where the layer runs at positions, of those that have a gradient.

    Attributes:
        inputs (torch.Tensor): Rows of H, shape (N, D).
        grads (torch.Tensor | SoftmaxGrads): Rows of P, shape (N, C).
        counts (torch.Tensor, optional): The number of positions of each sample, shape (n,), on the CPU; None where
            each sample is a row.
        finite (torch.Tensor): Whether all numbers are finite, a boolean scalar.
    """

    inputs: torch.Tensor
    grads: torch.Tensor | SoftmaxGrads
    counts: torch.Tensor | None
    finite: torch.Tensor

    @classmethod
    def of(
        cls, layer: OutputLayer, inputs: torch.Tensor, grads: torch.Tensor, outputs: torch.Tensor, num_samples: int
    ) -> LayerGradients:
        """Keeps what the Gram matrix needs of some of ``num_samples`` samples.

        Args:
            layer (OutputLayer): The output layer.
            inputs (torch.Tensor): Their H, shape (n, D) or (n, T, D).
            grads (torch.Tensor): Their P, shape (n, C) or (n, T, C).
            outputs (torch.Tensor): What the layer put out, of P's shape.
            num_samples (int): M, the number of samples in all.
        """
        finite = all_finite(inputs, grads)
        if inputs.untyped_storage().nbytes() > inputs.nbytes:
            inputs = inputs.clone()  # A view (of the first position, say) keeps all of the backbone's output.
        if inputs.dim() == 2:
            return cls(inputs, grads, None, finite)
        kept = grads.flatten(1, -2).ne(0).any(-1)
        counts = kept.sum(1).cpu()
        keep = (lambda rows: rows.flatten(0, -2)) if kept.all() else (lambda rows: rows.flatten(1, -2)[kept])
        rows = keep(grads)
        compact = None
        if finite and _is_whole(layer) and rows.nbytes * num_samples / len(inputs) > STORED_BYTES:
            compact = SoftmaxGrads.recognise(keep(outputs), rows)
        if compact is not None:
            # In the precision that autocast ran the layer in, so that its outputs come out the same again.
            return cls(keep(inputs).to(outputs.dtype), compact, counts, finite)
        return cls(keep(inputs), rows, counts, finite)


def _is_whole(layer: OutputLayer) -> bool:
    """Tells whether this process holds all of the layer's weight, which FSDP spreads over the ranks."""
    return not isinstance(layer.weight, DTensor) and layer.weight.shape == (layer.out_features, layer.in_features)


def all_inputs(parts: Sequence[LayerGradients]) -> torch.Tensor:
    """Puts the rows of H together, shape (N, D).

    Args:
        parts (Sequence[LayerGradients]): In the order of the samples.
    """
    return joined([part.inputs for part in parts])


def all_grads(parts: Sequence[LayerGradients], layer: OutputLayer) -> torch.Tensor:
    """Puts the rows of P together, shape (N, C), also those that were kept as what they can be computed from.

    Args:
        parts (Sequence[LayerGradients]): In the order of the samples.
        layer (OutputLayer): The output layer.
    """
    return _columns(parts, layer)(0, layer.out_features)


def _columns(parts: Sequence[LayerGradients], layer: OutputLayer) -> Callable[[int, int], torch.Tensor]:
    """Gives a function that gives some columns of P."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()

    def columns(start: int, stop: int) -> torch.Tensor:
        found = [
            part.grads[:, start:stop]
            if isinstance(part.grads, torch.Tensor)
            else part.grads.columns(part.inputs, weight, bias, start, stop)
            for part in parts
        ]
        return joined(found)

    return columns


def gram_of_all(parts: Sequence[LayerGradients], layer: OutputLayer) -> torch.Tensor:
    """Computes K of all parts' samples, shape (M, M), float64, on the layer's device.

    Args:
        parts (Sequence[LayerGradients]): In the order of the samples.
        layer (OutputLayer): The output layer.
    """
    inputs = all_inputs(parts)
    stored = [part.grads for part in parts if isinstance(part.grads, torch.Tensor)]
    has_bias = layer.bias is not None
    if parts[0].counts is None:
        return last_layer_gram(inputs.double(), joined(stored).double(), has_bias)
    counts = torch.cat([part.counts for part in parts if part.counts is not None])
    if len(stored) == len(parts):
        return position_gram(inputs, joined(stored), counts, layer.out_features, has_bias)
    return position_gram(inputs, _columns(parts, layer), counts, layer.out_features, has_bias)
