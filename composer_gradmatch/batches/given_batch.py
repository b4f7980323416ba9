"""A batch as it was given to a loss, which may change it in place or take things out of it."""

from __future__ import annotations

from typing import Any

import torch

from composer_gradmatch.batches.minibatch import copy_batch
from composer_gradmatch.batches.nests import map_nest, named_leaves

__all__ = ["GivenBatch"]


class GivenBatch:
    """Remembers a batch, so that a second call of a loss can be given what the first one was.

    Args:
        batch (Any): A batch.
    """

    def __init__(self, batch: Any) -> None:
        self._leaves = {name: (leaf, _version(leaf)) for name, leaf in named_leaves(batch)}
        self._copy = copy_batch(batch)

    def again(self, batch: Any) -> Any:
        """Gives the batch as it was, with what another algorithm has put in since.

        Args:
            batch (Any): The same batch as it is now.

        Returns:
            Any: The batch itself if nothing in it was changed in place, nor taken out.
        """
        now = dict(named_leaves(batch))
        put_in = {
            name: leaf for name, leaf in now.items() if name in self._leaves and leaf is not self._leaves[name][0]
        }
        if all(
            name in put_in or (name in now and _version(leaf) == version)
            for name, (leaf, version) in self._leaves.items()
        ):
            return batch
        return map_nest(lambda name, leaf: put_in.get(name, leaf), self._copy)


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else 0
