"""What batch normalisation asks of a forward pass."""

from __future__ import annotations

from torch import nn

from composer_gradmatch.forward.torch_private import BATCH_NORMS

__all__ = ["fewest_in_a_microbatch"]


def fewest_in_a_microbatch(model: nn.Module) -> int:
    """Tells how few samples a model takes at once: two where it normalises over the batch.

    Args:
        model (nn.Module): The model.
    """
    return 2 if any(isinstance(module, BATCH_NORMS) and module.training for module in model.modules()) else 1
