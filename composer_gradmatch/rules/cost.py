"""What a selecting step costs, in steps on the whole minibatch (§2 of the paper)."""

from __future__ import annotations

from typing import Literal

__all__ = ["FORWARD_SHARE", "Passes", "break_even", "step_cost"]

#: Forward passes over the whole minibatch beside the training step on the picks: none; one, which the training step
#: makes use of (``reuse_activations``), so that the picks need no forward pass of their own; or one more.
Passes = Literal[0, 1, 2]

#: The forward pass's share of a training step by the usual model, in which a backward pass costs two forward passes.
FORWARD_SHARE = 1 / 3


def step_cost(passes: Passes, keep: float, forward_share: float = FORWARD_SHARE) -> float:
    """Tells the cost of a step that trains on a share of its minibatch.

    Args:
        passes (int): 0 if nothing is looked at, 1 for one forward pass in all, 2 for a selection pass of its own.
        keep (float): m/M, the share of the minibatch that is trained on.
        forward_share (float, optional): f, the forward pass's share of a full step. Default: ``1/3``.

    Returns:
        float: keep, f + (1 − f)·keep or f + keep, in steps on the whole minibatch.

    Raises:
        ValueError: If ``passes`` is none of 0, 1 and 2.
    """
    if passes == 0:
        return keep
    if passes == 1:
        return forward_share + (1 - forward_share) * keep
    if passes == 2:
        return forward_share + keep
    raise ValueError(f"passes must be 0, 1 or 2, got {passes!r}.")


def break_even(cost: float, keep: float) -> float:
    """Tells how large a rule's squared error may be for random picks at the same cost to be no better: r*.

    A random subset's squared error against the minibatch's mean gradient is in proportion to 1/m − 1/M. So one of the
    cost c has (1/c − 1)/(1/keep − 1) times the error of one of the same number of picks.

    Args:
        cost (float): c, what the rule's step costs, in steps on the whole minibatch.
        keep (float): m/M, below one.

    Returns:
        float: r*, relative to the error of as many random picks; 0 where the step costs as much as the whole minibatch.

    Raises:
        ValueError: If ``keep`` or ``cost`` is out of range.
    """
    if not 0 < keep < 1 or cost <= 0:
        raise ValueError(f"break_even needs 0 < keep < 1 and a positive cost, got keep={keep} and cost={cost}.")
    return max(0.0, 1 / cost - 1) / (1 / keep - 1)
