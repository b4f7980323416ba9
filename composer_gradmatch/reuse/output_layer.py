"""The inputs and output gradients of the output layer, from a pass whose graph ends at the model's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from composer_gradmatch.last_layer import LinearLayer, OutputLayer
from composer_gradmatch.reuse.capture import Pass
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError

__all__ = ["inputs_and_grads", "saved_inputs_and_grads"]


def inputs_and_grads(
    made: Pass, layer: OutputLayer, leaves: Sequence[torch.Tensor], losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds H, P and the outputs of the output layer in a pass.

    Args:
        made (Pass): The pass, which has watched the layer.
        layer (OutputLayer): The output layer.
        leaves (Sequence[torch.Tensor]): What the model returned, as leaves of the losses' graph.
        losses (torch.Tensor): The samples' losses, shape (M,).

    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]: The layer's inputs, the gradients of its outputs, and those.

    Raises:
        UndecidedError: If the outputs are not finite, where that is to be found.
        UnsupportedError: If the model does not return the output layer's output as it is, or the losses depend on
            something else that it returns.
    """
    inputs, graphs = made.inputs, made.run.graphs
    assert inputs is not None
    if graphs.layer_output is None:
        if not all(bool(leaf.isfinite().all()) for leaf in leaves):
            raise UndecidedError("a minibatch has outputs that are not finite")
        graphs.layer_output = _position_of(layer, inputs, leaves)
    leaf = leaves[graphs.layer_output]
    if not losses.requires_grad:
        raise UnsupportedError("its losses do not depend on what it returns")
    grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    if sum(grad is not None for grad in grads) != 1 or grads[graphs.layer_output] is None:
        raise UnsupportedError("its losses depend on other outputs than the output layer's")
    (grad,) = (grad for grad in grads if grad is not None)
    shape = (*inputs.shape[:-1], layer.out_features)
    return inputs, layer.rows_of_outputs(grad, shape), layer.rows_of_outputs(leaf.detach(), shape)


def saved_inputs_and_grads(
    made: Pass, model: nn.Module, leaves: Sequence[torch.Tensor], losses: torch.Tensor
) -> tuple[OutputLayer, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Finds the output layer of a pass that has watched none, by what the pass has saved for its backward pass.

    A linear layer's weight gradient takes its inputs, so that these are saved; and which saved tensor they are, and of
    which layer, is told by the numbers that the layer makes of them.

    Args:
        made (Pass): The pass, from which no picks have been taken.
        model (nn.Module): The model.
        leaves (Sequence[torch.Tensor]): What it returned, as leaves of the losses' graph.
        losses (torch.Tensor): The samples' losses, shape (M,), with their graph, which is kept.

    Returns:
        tuple[OutputLayer, torch.Tensor, torch.Tensor, torch.Tensor] | None: The layer, its inputs, shape (M, D), the
        gradients of its outputs, shape (M, C), and the leaf that has those. None where the losses do not depend on
        exactly one output of the model, where this is no ``nn.Linear``'s output as it is, or where the layer runs at
        several positions of each sample, has a ``forward`` of its own, or its inputs are not saved (frozen weights).
    """
    if not losses.requires_grad:
        return None
    grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, retain_graph=True)
    reached = [(leaf, grad) for leaf, grad in zip(leaves, grads, strict=True) if grad is not None]
    if len(reached) != 1:
        return None
    (leaf, grad), m = reached[0], len(losses)
    saved = [each for each in made.run.saved if isinstance(each, torch.Tensor) and each.is_floating_point()]
    for layer in (LinearLayer(module) for module in model.modules() if isinstance(module, nn.Linear)):
        if leaf.numel() != m * layer.out_features or layer.has_own_forward:
            continue
        for inputs in saved:
            if inputs.shape == (m, layer.in_features) and _is_made_of(leaf, layer, inputs.detach()):
                return layer, inputs.detach(), grad.reshape(m, layer.out_features), leaf
    return None


def _position_of(layer: OutputLayer, inputs: torch.Tensor, leaves: Sequence[torch.Tensor]) -> int:
    """Tells which of a model's outputs holds what the output layer made of its inputs."""
    found = [i for i, leaf in enumerate(leaves) if _is_made_of(leaf, layer, inputs)]
    if len(found) != 1:
        raise UnsupportedError("it does not return its output layer's output as it is")
    return found[0]


@torch.no_grad()
def _is_made_of(leaf: torch.Tensor, layer: OutputLayer, inputs: torch.Tensor) -> bool:
    """Tells whether an output is, in any shape, what a layer makes of its inputs."""
    if leaf.numel() * layer.in_features != inputs.numel() * layer.out_features:
        return False
    wide = inputs.double()
    outputs = F.linear(wide, layer.weight.to(wide), None if layer.bias is None else layer.bias.to(wide))
    tolerance = 3e-2 if torch.bfloat16 in (leaf.dtype, inputs.dtype) else 3e-3
    error = (layer.rows_of_outputs(leaf, tuple(outputs.shape)).double() - outputs).norm()
    return bool(error <= tolerance * outputs.norm())
