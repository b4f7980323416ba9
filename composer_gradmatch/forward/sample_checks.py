"""Showing, on a few samples of the first minibatch, that row i of what selection looks at is sample i's own.

Two experiments. *One sample is replaced* by another: what changes most must be its row. That holds with dropout, too,
whose masks stay with the rows. *The samples are turned round*: the rows must come turned round, too; only for models
that draw no random numbers. Layers that mix samples pass both, as long as each row is mostly its own sample's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from composer_gradmatch.forward.torch_private import BATCH_NORMS

__all__ = ["Rows", "check_independence", "check_rows", "find_dependence_on_batch", "normalised_by_running_statistics"]

#: What selection looks at, by name, for samples with the given numbers: tensors with a row for each.
Rows = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]

#: How many samples are replaced, one at a time.
_TRIALS = 4
#: How far, relative to the largest row, rows may be from themselves when the samples are turned round.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-2, 1e-1
_LOSSES = "the losses"


def check_rows(rows_of: Rows, num_samples: int, deterministic: bool, remedy: str) -> None:
    """Checks that row i of what selection looks at is sample i's.

    Args:
        rows_of (Callable): Gives the rows for samples with the given numbers, int64, shape (n,), each time from the
            same state of the model and the random number generators.
        num_samples (int): n, the number of samples to try on.
        deterministic (bool): Whether the model draws no random numbers.
        remedy (str): What to do if they are not, for the message.

    Raises:
        ValueError: If the rows are not the samples, in their order.
    """
    if num_samples < 2:
        return
    own = torch.arange(num_samples)
    before = rows_of(own)
    for sample in own[:: -(-num_samples // _TRIALS)].tolist():
        replaced = own.clone()
        replaced[sample] = (sample + num_samples // 2) % num_samples
        after = rows_of(replaced)
        for name, rows in before.items():
            changes = _distances(rows, after[name])
            if changes.max() > 0 and changes[sample] < changes.max():
                raise ValueError(
                    f"Row i of {name} is not sample i's: replacing sample {sample} changes row "
                    f"{int(changes.argmax())} most. {remedy}"
                )
    if not deterministic:
        return
    turned = rows_of(own.flip(0))
    for name, rows in before.items():
        low = rows.dtype in (torch.float16, torch.bfloat16)
        difference, size = _distances(rows.flip(0), turned[name]), _distances(rows, torch.zeros_like(rows))
        if difference.max() > (_LOW_PRECISION_TOLERANCE if low else _TOLERANCE) * size.max():
            raise ValueError(
                f"The rows of {name} are not in the order of the samples: with the samples turned round they are "
                f"others. {remedy}"
            )


def check_independence(losses: torch.Tensor, leaf: torch.Tensor, sample_dim: int = 0) -> int | None:
    """Finds a sample whose loss depends on another sample's outputs.

    Args:
        losses (torch.Tensor): The samples' losses, shape (n,), with their graph from ``leaf``.
        leaf (torch.Tensor): Outputs with a row for each sample, shape (n, ...).
        sample_dim (int, optional): Another dimension that is the samples'. Default: ``0``.

    Returns:
        int | None: Such a sample; None if there is none among those tried.
    """
    n = len(losses)
    for sample in range(0, n, -(-n // _TRIALS)):
        (grad,) = torch.autograd.grad(losses[sample], leaf, retain_graph=True, allow_unused=True)
        if grad is None:
            continue
        rows = grad.movedim(sample_dim, 0)
        sizes = _distances(rows, torch.zeros_like(rows))
        if sizes.sum() - sizes[sample] > 1e-6 * sizes.max():
            return sample
    return None


def find_dependence_on_batch(losses_of: Rows, num_samples: int) -> int | None:
    """Finds a sample on which other samples' losses depend by more than a factor common to all of them.

    Advantages that the loss centres, or class weights that it counts in the batch, make them depend without a gradient.
    A common factor, as of the number of tokens, is left to the step.

    Args:
        losses_of (Callable): Gives ``"the losses"`` of samples with the given numbers, and what else must not change
            for them to tell anything: where the model mixes samples, the loss need not.
        num_samples (int): n, the number of samples to try on.

    Returns:
        int | None: Such a sample; None if there is none among those tried.
    """
    own = torch.arange(num_samples)
    before = losses_of(own)
    # More of them than elsewhere: a sample of the same class, say, changes nothing.
    for sample in own[:: -(-num_samples // (2 * _TRIALS))].tolist():
        replaced = own.clone()
        replaced[sample] = (sample + num_samples // 2) % num_samples
        after = losses_of(replaced)
        others = own != sample
        mixed = {
            name: _differ(rows.cpu()[others], after[name].cpu()[others], name == _LOSSES)
            for name, rows in before.items()
        }
        if mixed.pop(_LOSSES) and not any(mixed.values()):
            return sample
    return None


def _differ(ones: torch.Tensor, others: torch.Tensor, up_to_factor: bool) -> bool:
    """Tells whether rows differ, as far as they are finite; of other lengths they do."""
    if ones.shape != others.shape:
        return True
    low = ones.dtype in (torch.float16, torch.bfloat16)
    one, other = ones.double().flatten(), others.double().flatten()
    known = one.isfinite() & other.isfinite()
    one, other = one[known], other[known]
    squared = one @ one
    factor = (one @ other) / squared if up_to_factor and squared > 0 else 1.0
    return bool((other - factor * one).norm() > (_LOW_PRECISION_TOLERANCE if low else 1e-3) * other.norm())


def _distances(ones: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Finds each row's distance; what is not finite in both is no difference, and other lengths say nothing."""
    if len(ones) != len(others):
        raise ValueError(f"The same number of samples gave {len(ones)} rows and {len(others)}.")
    if ones.shape != others.shape:
        return torch.zeros(len(ones), dtype=torch.float64)
    difference = (ones.double() - others.double()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return difference.flatten(1).norm(dim=1).cpu() if ones.dim() > 1 else difference.abs().cpu()


@contextmanager
def normalised_by_running_statistics(model: nn.Module) -> Iterator[None]:
    """Lets batch normalisation mix no samples while the context is open.

    Layers that keep no statistics are lent those of the standard normal distribution.

    Args:
        model (nn.Module): The model.
    """
    layers: list[Any] = [each for each in model.modules() if isinstance(each, BATCH_NORMS)]
    trained = [each for each in layers if each.training]
    without = [each for each in layers if each.running_mean is None and each.running_var is None]
    like = next((each for each in model.parameters()), torch.empty(0))
    for layer in without:
        # Of a layer's own dtype: without a scale, its inputs' is that of the model's parameters.
        kind = like if layer.weight is None else layer.weight
        layer.running_mean = torch.zeros(layer.num_features, device=kind.device, dtype=kind.dtype)
        layer.running_var = torch.ones(layer.num_features, device=kind.device, dtype=kind.dtype)
    for layer in trained:
        layer.training = False
    try:
        yield
    finally:
        for layer in trained:
            layer.training = True
        for layer in without:
            layer.running_mean = layer.running_var = None
