"""The picks that the Trainer is served."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from composer_gradmatch.batches import find_rows, tensor_leaves

__all__ = ["ServedPicks"]


class ServedPicks:
    """Tells which of the picks a microbatch holds, and whether all of them were asked for.

    Args:
        picks (torch.Tensor): The picked samples of the minibatch, int64, shape (m,).
        batch (Any): Their batch, in containers that nobody else changes.
        inputs (Callable): Gives what of a batch the forward pass is called with.
        read (Sequence[bool]): Which of that batch's tensors the forward pass has read.
    """

    def __init__(self, picks: torch.Tensor, batch: Any, inputs: Callable[[Any], Any], read: Sequence[bool]) -> None:
        self._picks, self._batch, self._inputs, self._read = picks, batch, inputs, read
        self._marks = self._mark()
        #: Which picks have been served, as positions among them.
        self.served: set[int] = set()
        self._others_came = False

    def find(self, batch: Any) -> torch.Tensor | None:
        """The positions, int64, shape (n,), among the picks of a microbatch's samples; None if others are in it."""
        rows = None
        if self._marks == self._mark():
            rows = find_rows(self._inputs(batch), self._inputs(self._batch), len(self._picks), self._read)
        self._others_came |= rows is None
        return rows

    def samples(self, rows: torch.Tensor) -> torch.Tensor:
        """Gives the samples of the minibatch, int64, shape (n,), that picks are."""
        return self._picks[rows.to(self._picks.device)]

    @property
    def missed(self) -> str | None:
        """Why picks were not served, if other samples came in their place."""
        if not self._others_came or len(self.served) == len(self._picks):
            return None
        return (
            "the samples that are trained on are not those that were picked: microbatch_transforms or another "
            "algorithm changes them after the selection"
        )

    def let_go(self) -> None:
        """Lets go of the picks' batch."""
        self._batch = None

    def _mark(self) -> list[Any]:
        """Tells what shows that a tensor of the picks that the forward pass reads was changed in place.

        On the CPU also its sum: what changes ``tensor.data`` counts no version.
        """
        leaves = zip(tensor_leaves(self._inputs(self._batch)), self._read, strict=True)
        return [
            (
                leaf._version,
                struct.pack("d", leaf.abs().sum() if leaf.is_complex() else leaf.sum())
                if leaf.device.type == "cpu"
                else None,
            )
            for leaf, is_read in leaves
            if is_read
        ]
