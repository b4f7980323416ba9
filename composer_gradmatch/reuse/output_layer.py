"""The inputs and output gradients of the output layer, from a pass whose graph ends at the model's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from composer_gradmatch.last_layer import OutputLayer
from composer_gradmatch.reuse.capture import Pass
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError

__all__ = ["inputs_and_grads"]


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


@torch.no_grad()
def _position_of(layer: OutputLayer, inputs: torch.Tensor, leaves: Sequence[torch.Tensor]) -> int:
    """Tells which of a model's outputs holds what the output layer made of its inputs."""
    wide = inputs.double()
    outputs = F.linear(wide, layer.weight.to(wide), None if layer.bias is None else layer.bias.to(wide))
    found = []
    for i, leaf in enumerate(leaves):
        if leaf.numel() == outputs.numel():
            tolerance = 3e-2 if torch.bfloat16 in (leaf.dtype, inputs.dtype) else 3e-3
            error = (layer.rows_of_outputs(leaf, tuple(outputs.shape)).double() - outputs).norm()
            if error <= tolerance * outputs.norm():
                found.append(i)
    if len(found) != 1:
        raise UnsupportedError("it does not return its output layer's output as it is")
    return found[0]
