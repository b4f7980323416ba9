"""A tap that refuses a layer whose H and P are not its gradients, or that the loss does not go through first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from composer_gradmatch.last_layer.find import NEEDS_NONE, name_of
from composer_gradmatch.last_layer.graph import learned_behind
from composer_gradmatch.last_layer.layers import OutputLayer
from composer_gradmatch.last_layer.linearity import watch_linearity
from composer_gradmatch.last_layer.tap import OutputLayerTap

__all__ = ["CheckedTap", "check_output_layer"]


def check_output_layer(
    model: nn.Module, layer: OutputLayer, leaf: torch.Tensor, losses: torch.Tensor, chosen: bool
) -> str | None:
    """Checks that the losses go through a layer first, and through nothing learned behind it.

    Args:
        model (nn.Module): The model, for names.
        layer (OutputLayer): The output layer.
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
        f"output there are {listed}. If an nn.Linear has them, pass it as output_layer; if none "
        "has, write what has them as one. To match the gradient of "
        f"{name} all the same, pass it as output_layer. {NEEDS_NONE}"
    )


class CheckedTap(OutputLayerTap):
    """An :class:`.OutputLayerTap` that shows that H and P give the layer's gradients, and that nothing is behind it.

    Args:
        model (nn.Module): The model, for names.
        layer (OutputLayer): The output layer.
        chosen (bool): Whether the user named the layer.

    Attributes:
        warning (str, optional): What is to be said of a layer that the user named; None for nothing.
    """

    def __init__(self, model: nn.Module, layer: OutputLayer, chosen: bool) -> None:
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
                f"The output layer {name_of(self.model, self.layer)}, {self.layer.kind}, does not put out "
                f"its input times its weight plus its bias: {fault}. The gradients that would be matched are not its "
                "own. Normalise and scale before or behind a plain layer (without hooks that change its output), "
                f"or pass another one as output_layer. {NEEDS_NONE}"
            )

    def inputs_and_grads(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes H and P: see :meth:`.OutputLayerTap.inputs_and_grads`.

        Raises:
            ValueError: Also if the layer was found, and the losses go through other parameters first.
        """
        if losses.requires_grad:
            self.warning = check_output_layer(self.model, self.layer, self.leaf, losses, self.chosen)
        return super().inputs_and_grads(losses)
