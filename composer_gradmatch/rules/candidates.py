"""What a rule sees of a minibatch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from composer_gradmatch.last_layer import last_layer_gram

__all__ = ["Candidates"]


class Candidates:
    """The samples of a minibatch as a rule sees them; where they were looked at is not the rule's business.

    Sources give functions in the place of tensors, so that what no rule asks for is never computed. The tensors are
    on the model's device and without a graph; a rule may move them, and must not change them.

    Args:
        num_samples (int): M.
        losses (torch.Tensor, optional): ℓ, shape (M,). Default: ``None``.
        inputs (torch.Tensor | Callable, optional): H, the output layer's inputs, shape (M, D). Where the layer runs at
            positions of each sample, the rows of those that have a gradient, sample by sample: (N, D).
            Default: ``None``.
        output_grads (torch.Tensor | Callable, optional): P, the gradients of the losses at its outputs, shape (M, C)
            or (N, C). Default: ``None``.
        gram (torch.Tensor | Callable, optional): K, shape (M, M), float64; None to compute it from H and P, rows of
            which are then the samples. Default: ``None``.
        counts (torch.Tensor, optional): Where the layer runs at positions, each sample's number of rows of H and P,
            shape (M,). Default: ``None``.
        bias (bool, optional): Whether the output layer has a bias. Default: ``True``.
        labels (torch.Tensor | Callable, optional): The samples' classes, integers, shape (M,), which no pass is needed
            for. Default: ``None``.
        finite (bool | Callable, optional): Whether all that was looked at is finite. Default: ``True``.

    Attributes:
        num_samples (int): M.
        counts (torch.Tensor, optional): See above.

    Example:
        .. code-block:: python

            candidates = Candidates(128, losses=losses, inputs=h, output_grads=p)  # a rule needs no Trainer
            picks = my_rule(candidates, 32)
    """

    def __init__(
        self,
        num_samples: int,
        *,
        losses: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        inputs: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        output_grads: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        gram: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        counts: torch.Tensor | None = None,
        bias: bool = True,
        labels: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        finite: bool | Callable[[], bool] = True,
    ) -> None:
        self.num_samples = num_samples
        #: Which samples of the minibatch they are; None for all.
        self.rows: torch.Tensor | None = None
        self.counts = counts
        self._losses, self._inputs, self._output_grads, self._gram = losses, inputs, output_grads, gram
        self._bias, self._labels, self._finite = bias, labels, finite

    @cached_property
    def losses(self) -> torch.Tensor:
        """The loss of each sample, ℓ, shape (M,).

        Raises:
            ValueError: If the samples were not looked at.
        """
        if self._losses is None:
            raise ValueError(
                "This rule asks for the samples' losses, but no pass was made over them, since its record says "
                "needs='nothing'. Give it Rule(..., needs='losses') or needs='gradients'."
            )
        return self._losses() if callable(self._losses) else self._losses

    @cached_property
    def inputs(self) -> torch.Tensor:
        """The output layer's inputs, H, shape (M, D); of positions that have a gradient, (N, D) with ``counts``.

        Raises:
            ValueError: If they were not looked at.
        """
        return self._given(self._inputs, "the output layer's inputs")

    @cached_property
    def output_grads(self) -> torch.Tensor:
        """The losses' gradients at the output layer's outputs, P, shape (M, C); or (N, C), as :attr:`inputs`.

        Where P is large (language models) it is kept as what it can be computed from, and is made whole here: N·C
        numbers.

        Raises:
            ValueError: If they were not looked at.
        """
        return self._given(self._output_grads, "the gradients at the output layer")

    @cached_property
    def gram(self) -> torch.Tensor:
        """The Gram matrix of the samples' last-layer gradients, K (eq. 4), shape (M, M), float64.

        Its row means are the gradients' products with the minibatch's mean gradient; its diagonal has their squared
        norms.

        Raises:
            ValueError: If they were not looked at.
        """
        if self._gram is None and self._inputs is not None and self._output_grads is not None:
            return last_layer_gram(self.inputs.double(), self.output_grads.double(), self._bias)
        return self._given(self._gram, "the Gram matrix of last-layer gradients")

    @cached_property
    def labels(self) -> torch.Tensor:
        """The samples' classes, int64, shape (M,): read from the batch's targets, whatever the rule needs.

        Raises:
            ValueError: If there are none, or they are no classes.
        """
        if self._labels is None:
            raise ValueError("This rule asks for the samples' classes, but it was given none: Candidates(labels=...).")
        labels = self._labels() if callable(self._labels) else self._labels
        if labels.is_floating_point() or labels.shape != (self.num_samples,):
            raise ValueError(
                f"labels must be integers, one for each of the {self.num_samples} samples; got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        return labels.long()

    def of_rows(self, rows: torch.Tensor) -> Candidates:
        """Gives some of the candidates alone, so that a rule sees no others and matches their mean gradient.

        Args:
            rows (torch.Tensor): Which, int64, shape (n,); kept as the attribute ``rows`` of what is returned. Each
                sample must be a row of H and P (no ``counts``).
        """
        rows = rows.cpu()

        def some(value: torch.Tensor) -> torch.Tensor:
            return value[rows.to(value.device)]

        def gram() -> torch.Tensor:
            whole = self.gram
            return whole[rows.to(whole.device)][:, rows.to(whole.device)]

        some_of = Candidates(
            len(rows),
            losses=None if self._losses is None else lambda: some(self.losses),
            inputs=None if self._inputs is None else lambda: some(self.inputs),
            output_grads=None if self._output_grads is None else lambda: some(self.output_grads),
            gram=None if self._gram is None else gram,
            bias=self._bias,
            labels=None if self._labels is None else lambda: some(self.labels),
            finite=self._finite,
        )
        some_of.rows = rows
        return some_of

    def look_at_losses_only(self) -> None:
        """Lets :attr:`finite` be of the losses, for a rule that asks for no more."""
        losses = self.losses
        self._finite = lambda: bool(losses.isfinite().all())

    @property
    def has_gram(self) -> bool:
        """Whether K is there, or costs little: over many positions of each sample it is computed if a rule asks."""
        if "gram" in vars(self):
            return True
        return self.counts is None and (self._gram is not None or self._output_grads is not None)

    @property
    def finite(self) -> bool:
        """Whether all numbers that were looked at are finite; on a GPU, the host waits for the answer."""
        return self._finite() if callable(self._finite) else self._finite

    def _given(self, value: torch.Tensor | Callable[[], torch.Tensor] | None, what: str) -> torch.Tensor:
        if value is None:
            raise ValueError(
                f"This rule asks for {what}, but these were not looked at. Give it a record that says so: "
                "Rule(..., needs='gradients')."
            )
        return value() if callable(value) else value
