"""Samples whose labels look wrong: those that another class has long been more probable for than their label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import State, Time, TimeUnit

__all__ = ["Suspects", "margins_of"]


@dataclass(frozen=True)
class Suspects:
    """When a sample is suspected, by its area under the margin (Pleiss et al., 2020), which a store has for free.

    At each visit the margin is the largest probability of another class less the label's, by the current output layer
    on the stored row of H. A sample whose average is above ``margin`` is left out of the candidates and of the
    minibatch's mean gradient. It is judged anew at each visit. Labels are the places of their classes' outputs, from 0
    on; a sample whose label is none, as one that the loss ignores (-100), is never suspected.

    Attributes:
        margin (float): From where on, in (-1, 1). Default: ``0.4``.
        after (str): From when on, as Composer writes times: ``"2ep"``, ``"500ba"``. Default: ``"2ep"``.
        decay (float): What the average so far counts, in [0, 1). Default: ``0.7``.

    Raises:
        ValueError: If a value is out of range.
    """

    margin: float = 0.4
    after: str = "2ep"
    decay: float = 0.7

    def __post_init__(self) -> None:
        if not -1 < self.margin < 1:
            raise ValueError(f"suspects.margin must be in (-1, 1), a difference of probabilities; got {self.margin}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"suspects.decay must be in [0, 1), what the average so far counts; got {self.decay}.")
        try:
            unit = Time.from_input(self.after).unit
        except (ValueError, TypeError) as error:
            raise ValueError(f"suspects.after must be a time such as '2ep', got {self.after!r}.") from error
        if unit not in (TimeUnit.EPOCH, TimeUnit.BATCH):
            raise ValueError(f"suspects.after must be in epochs ('2ep') or batches ('500ba'), got {self.after!r}.")

    @classmethod
    def of(cls, value: bool | Mapping[str, Any] | None) -> Suspects | None:
        """Reads what a strategy is given.

        Args:
            value (bool | Mapping): False or None for none, True for the defaults, or values by name.

        Raises:
            TypeError: If it is something else, or there is no such value.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if not isinstance(value, Mapping):
            raise TypeError(f"suspects must be true, false or a mapping of margin, after and decay; got {value!r}.")
        known = ("margin", "after", "decay")
        if unknown := [key for key in value if key not in known]:
            raise TypeError(f"suspects has no {unknown[0]!r}; it has margin, after and decay.")
        return cls(**value)

    def begin(self, state: State) -> bool:
        """Tells whether the time has come to leave samples out."""
        after = Time.from_input(self.after)
        return state.timestamp.get(after.unit).value >= after.value

    def check_layer(self, can_compute: bool, num_outputs: int) -> None:
        """Raises if margins cannot be told at an output layer.

        Args:
            can_compute (bool): Whether the loss follows from the layer's output on stored inputs.
            num_outputs (int): C.

        Raises:
            ValueError: If the output layer's outputs are not what the loss takes, or are not the logits of classes.
        """
        if not can_compute:
            raise ValueError(
                "suspects are told by the output layer's logits on stored inputs, but the loss takes something else "
                "than that layer's output (or the store keeps a projection of its inputs: raise store_limit). Leave "
                "suspects out."
            )
        if num_outputs < 2:
            raise ValueError(
                "suspects are told by the probability of another class than the label's, but the output layer has one "
                "output. Give it one for each class, with a cross-entropy of both, or leave suspects out."
            )

    def check_labels(self, output_grads: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Raises if labels are not the places of their classes' outputs, as those counted from 1 are not.

        The loss of a class pulls up that class's output, and a model that has learned predicts it.

        Args:
            output_grads (torch.Tensor): P of some samples, shape (M, C); zero for those that the loss ignores.
            logits (torch.Tensor): Shape (M, C).
            labels (torch.Tensor): Shape (M,).

        Raises:
            ValueError: If that is so of less than half of them.
        """
        labels = labels.to(logits.device)
        counted = output_grads.abs().sum(1) > 0
        pulled = output_grads.argmin(1)
        wrong = (counted & (pulled != labels) & (logits.argmax(1) != labels)).nonzero().flatten()
        if 2 * len(wrong) <= int(counted.sum()):
            return
        row = int(wrong[0])
        raise ValueError(
            f"suspects are told by the probability of the label's class, but for {len(wrong)} of {int(counted.sum())} "
            f"samples the loss is that of another output than the label's: of label {int(labels[row])}, that of "
            f"output {int(pulled[row])} (labels from {int(labels.min())} to {int(labels.max())}, {logits.shape[1]} "
            "outputs from 0 on). Pass as target_key a pair of a getter and a setter whose getter makes the outputs' "
            "places of the targets (labels - 1, say), or leave suspects out."
        )


def margins_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Computes the largest probability of another class less that of the label.

    Args:
        logits (torch.Tensor): Shape (M, C), C > 1.
        labels (torch.Tensor): Classes, shape (M,).

    Returns:
        torch.Tensor: In [-1, 1], float32, shape (M,), on the host; NaN for labels outside [0, C).
    """
    probabilities = logits.detach().float().softmax(1).cpu()
    labels = labels.cpu()
    known = (labels >= 0) & (labels < logits.shape[1])
    column = labels.clamp(0, logits.shape[1] - 1)[:, None]
    own = probabilities.gather(1, column)[:, 0]
    others = probabilities.scatter(1, column, -1.0).amax(1)
    return torch.where(known, others - own, torch.nan)
