"""A minibatch whose forward pass is made."""

from __future__ import annotations

from typing import Any

from torch import nn

from composer_gradmatch.reuse.batch_parts import lists_of_samples, without_lists
from composer_gradmatch.reuse.loss_in_outputs import LossInOutputs
from composer_gradmatch.reuse.start import Start

__all__ = ["Minibatch"]


class Minibatch:
    """Holds a minibatch, and where its forward pass begins: here and now.

    Args:
        model (nn.Module): The model.
        loss (LossInOutputs): The loss that it would put into its outputs.
        batch (Any): The minibatch.
        num_samples (int): M.
    """

    def __init__(self, model: nn.Module, loss: LossInOutputs, batch: Any, num_samples: int) -> None:
        self.batch, self.num_samples = batch, num_samples
        self.start = Start(model)
        self._loss, self._lists = loss, lists_of_samples(batch, num_samples)

    def inputs(self, batch: Any) -> Any:
        """Tells what of a batch, of all samples or of some, the captured forward pass is called with."""
        return self._loss.without_labels(without_lists(batch, self._lists))
