"""What a model's own reduction divides the sum of its samples' losses by, read off gradients.

A model's own loss of n samples is L = (1/Z)·Σᵢℓᵢ + R: Z is n for a mean, the number of counted positions or the sum of
class weights for other losses; R are terms that are no sample's (a penalty on the parameters, say). Z is read off the
gradients at what the model returns, 1/Z = ⟨∂L, ∂Σℓ⟩/‖∂Σℓ‖², not off values: L/Σℓ has R in it, and is a quotient of
rounding errors where losses cancel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

__all__ = ["LossScale", "gradients_at", "is_low"]

#: How far, of its own norm, ∂L may be from a multiple of ∂Σℓ, in single and in half precision.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-4, 1e-2


class LossScale:
    """Reads 1/Z of one microbatch after another.

    Where ∂L is no multiple of ∂Σℓ, a term of the loss that depends on the outputs has no part in the samples' losses
    (a consistency term that was zero before). Then 1/Z is that of the microbatches before, if n/Z was the same for all
    of them; else the best fit. The same where a single row of outputs has a gradient, of which nothing can be told.
    """

    def __init__(self) -> None:
        #: n/Z of the first microbatch that shows it, and whether it was the same ever since.
        self._usual: torch.Tensor | None = None
        self._constant: torch.Tensor | None = None
        #: Whether there was another term that depends on the outputs: a boolean scalar, once there was a microbatch.
        self.other_terms: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps: n/Z and whether it is constant."""
        if self._usual is None or self._constant is None:
            return {}
        return {"usual": float(self._usual), "constant": bool(self._constant)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        if state:
            self._usual = torch.tensor(state["usual"], dtype=torch.float64)
            self._constant = torch.tensor(state["constant"])

    def read(
        self,
        losses: torch.Tensor,
        own_loss: torch.Tensor,
        points: Sequence[torch.Tensor],
        other_own_losses: Iterable[torch.Tensor] = (),
        trusted: bool = False,
    ) -> torch.Tensor:
        """Reads 1/Z off the gradients of a microbatch; asks a GPU for nothing.

        Args:
            losses (torch.Tensor): ℓ, shape (n,), with their graph.
            own_loss (torch.Tensor): L, the model's own loss of the same samples, one number, with its graph.
            points (Sequence[torch.Tensor]): Tensors that both may depend on: what the model returned.
            other_own_losses (Iterable[torch.Tensor], optional): The same as L, computed in another way, to be tried
                where L does not depend on the points. Default: ``()``.
            trusted (bool, optional): Whether it is known that no other term depends on the points, so that a single
                row of gradients tells as much as several. Default: ``False``.

        Returns:
            torch.Tensor: 1/Z, float64, a scalar on the device of the losses.
        """
        n = len(losses)
        if not trusted and (usual := self._confirmed(losses, own_loss)) is not None:
            return usual
        readings = (gradients_at(points, losses, own) for own in itertools.chain([own_loss], other_own_losses))
        found = next((reading for reading in readings if reading is not None), None)
        self._move(losses.device)
        if found is None:
            return self._expected(n, losses)
        each, own = found
        tolerance = _LOW_PRECISION_TOLERANCE if any(is_low(grad) for grad in own) else _TOLERANCE
        squared, product = _inner(each, each), _inner(own, each)
        seen = squared > 0
        fit = product / torch.where(seen, squared, 1.0)
        left = [_wide(o) - fit * _wide(e) for o, e in zip(own, each, strict=True)]
        parallel = _inner(left, left) <= tolerance**2 * _inner(own, own)
        told = seen & parallel
        if not trusted and sum(e.numel() if e.dim() < 2 else e.numel() // e.shape[-1] for e in each) == 1:
            told = torch.zeros_like(told)
        scaled = fit * n
        scaled = torch.where((scaled - 1).abs() <= tolerance, 1.0, scaled)
        if self._usual is None or self._constant is None:
            self._usual, self._constant = torch.where(seen, scaled, 1.0), torch.ones_like(seen)
        alike = ~told | ((scaled - self._usual).abs() <= tolerance * self._usual.abs())
        self._constant = self._constant & alike
        other_terms = seen & ~parallel
        self.other_terms = other_terms if self.other_terms is None else self.other_terms | other_terms
        return torch.where(self._constant | ~seen, self._usual, scaled) / n

    def _confirmed(self, losses: torch.Tensor, own_loss: torch.Tensor) -> torch.Tensor | None:
        """Gives 1/Z as before, on a CPU, if the model's own loss is just that part of the sum of the samples' losses.

        Then it has no other terms. It saves two gradients; on a GPU it would make the host wait.
        """
        if losses.device.type != "cpu" or is_low(own_loss) or self._usual is None or not self._constant:
            return None
        scale = self._usual / len(losses)
        sizes = losses.tolist()
        factor, rounding = scale.item(), 16 * torch.finfo(own_loss.dtype).eps
        error = own_loss.item() - factor * sum(sizes)
        return scale if abs(error) <= rounding * abs(factor) * sum(map(abs, sizes)) else None

    def _move(self, device: torch.device) -> None:
        if self._usual is not None and self._constant is not None and self._usual.device != device:
            self._usual, self._constant = self._usual.to(device), self._constant.to(device)

    def _expected(self, n: int, losses: torch.Tensor) -> torch.Tensor:
        """Guesses 1/Z where there is nothing to read it off: as before, or of the mean, the commonest reduction."""
        usual = torch.ones((), dtype=torch.float64, device=losses.device) if self._usual is None else self._usual
        return usual / n


def gradients_at(
    points: Sequence[torch.Tensor], losses: torch.Tensor, own_loss: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Gradients of the sum of the samples' losses and of the model's own at the points that both depend on.

    Args:
        points (Sequence[torch.Tensor]): Tensors that they may depend on.
        losses (torch.Tensor): The samples' losses, with their graph.
        own_loss (torch.Tensor): The model's own loss, one number, with its graph.

    Returns:
        tuple[list[torch.Tensor], list[torch.Tensor]] | None: Of the samples' losses and of the model's own; None if
        there is no such point.
    """
    if not points or not losses.requires_grad or not own_loss.requires_grad:
        return None
    each = torch.autograd.grad(losses.sum(), points, retain_graph=True, allow_unused=True)
    points = [point for point, grad in zip(points, each, strict=True) if grad is not None]
    if not points:
        return None
    own = torch.autograd.grad(own_loss, points, retain_graph=True, allow_unused=True)
    both = [(e, o) for e, o in zip((e for e in each if e is not None), own, strict=True) if o is not None]
    return ([e for e, _ in both], [o for _, o in both]) if both else None


def is_low(values: torch.Tensor) -> bool:
    """Tells whether a tensor is in half precision."""
    return values.dtype in (torch.float16, torch.bfloat16)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.float() if is_low(values) else values


def _inner(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    products = [(_wide(a) * _wide(b)).sum(dtype=torch.float64) for a, b in zip(ones, others, strict=True)]
    return products[0] if len(products) == 1 else torch.stack(products).sum()
