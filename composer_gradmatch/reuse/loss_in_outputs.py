"""The loss that a HuggingFace model puts into its outputs, which is no sample's: it is added afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch

from composer_gradmatch.batches import copy_structure
from composer_gradmatch.forward.huggingface_losses import huggingface_losses
from composer_gradmatch.forward.losses import takes_loss_from_logits
from composer_gradmatch.reuse.unsupported import UnsupportedError, first_line
from composer_gradmatch.reuse.verify import check_outputs

__all__ = ["LossInOutputs"]


class LossInOutputs:
    """Keeps a model from computing a loss in its forward pass, and adds the loss to its outputs.

    Args:
        model (nn.Module): A ComposerModel, out of any wrapper.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        #: Whether the model puts a loss into its outputs; None where that is known from the first minibatch on only.
        self.is_put_in: bool | None = None if takes_loss_from_logits(model) else False

    def learn(self, own_outputs: Callable[[], Any]) -> None:
        """Finds out whether the model puts a loss into its outputs, if that is not known.

        Args:
            own_outputs (Callable): Runs the model on a batch with labels.

        Raises:
            UnsupportedError: If that fails.
        """
        if self.is_put_in is not None:
            return
        try:
            outputs = own_outputs()
        except Exception as error:
            raise UnsupportedError(f"it could not be run: {first_line(error)}") from error
        if isinstance(outputs, Mapping):
            self.is_put_in = outputs.get("loss") is not None
        else:
            first = outputs[0] if isinstance(outputs, tuple) else None
            self.is_put_in = isinstance(first, torch.Tensor) and not first.dim()

    def without_labels(self, batch: Any) -> Any:
        """Gives a batch of which the model computes no loss; the same one where it computes none in any case."""
        if not self.is_put_in:
            return batch
        batch = copy_structure(batch)
        batch.pop("labels", None)
        return batch

    def complete(self, outputs: Any, batch: Any) -> Any:
        """Gives the outputs with the loss that the model would have put in.

        Args:
            outputs (Any): What the model returned without labels.
            batch (Any): The batch of the same samples, with labels.

        Raises:
            UnsupportedError: If the outputs have no place for it.
        """
        if not self.is_put_in:
            return outputs
        is_tuple = isinstance(outputs, tuple)
        loss = huggingface_losses(self._model, (None, *outputs) if is_tuple else outputs, batch, reduction="mean")
        if is_tuple:
            return (loss, *outputs)
        if not isinstance(outputs, MutableMapping):
            raise UnsupportedError(f"it returns a {type(outputs).__name__}, which has no place for a loss")
        outputs = copy.copy(outputs)
        outputs["loss"] = loss
        return outputs

    def check(self, completed: Any, own: Any) -> None:
        """Compares the loss that :meth:`complete` has put in with the model's own.

        Raises:
            UndecidedError: If the model's own is not finite.
            UnsupportedError: If they differ.
        """
        key = "loss" if isinstance(own, MutableMapping) else 0
        check_outputs([completed[key]], [own[key]])
