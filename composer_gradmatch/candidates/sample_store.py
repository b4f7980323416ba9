"""What was last seen of each sample of a data set: its loss, its row of H, and an average of its margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["SampleStore", "Seen"]

#: Of a sample that was never looked at.
_NEVER = -(2**62)


@dataclass(frozen=True)
class Seen:
    """What was seen of n samples.

    Attributes:
        numbers (torch.Tensor): Which they are, int64, shape (n,), on the CPU.
        losses (torch.Tensor): ℓ, shape (n,).
        inputs (torch.Tensor, optional): Rows of H, shape (n, D). Default: ``None``.
        output_grads (torch.Tensor, optional): Rows of P, shape (n, C). Default: ``None``.
    """

    numbers: torch.Tensor
    losses: torch.Tensor
    inputs: torch.Tensor | None = None
    output_grads: torch.Tensor | None = None

    def cpu(self) -> Seen:
        """Gives it on the host, as it is shared between processes."""
        inputs, grads = (None if part is None else part.detach().cpu() for part in (self.inputs, self.output_grads))
        return Seen(self.numbers.cpu(), self.losses.detach().cpu(), inputs, grads)


class SampleStore:
    """Keeps what was last seen of each sample, dense, by its number.

    Args:
        size (int): N, the number of samples.
        limit (float, optional): The most memory for rows of H, in bytes. Above it, a fixed random projection of them is
            kept. Default: infinity.
        device (torch.device, optional): Where. Default: the host.
        keeps_grads (bool, optional): Whether P is kept, too. Default: ``False``.
    """

    def __init__(
        self,
        size: int,
        limit: float = float("inf"),
        device: torch.device | None = None,
        keeps_grads: bool = False,
    ) -> None:
        self.size, self.limit, self.device = size, limit, torch.device("cpu") if device is None else device
        self.keeps_grads = keeps_grads
        #: When each was last looked at, int64, in the unit of the refresh.
        self.stamps = torch.full((size,), _NEVER)
        self.losses = torch.zeros(size, device=self.device)
        #: An average over visits of how much more probable another class is than the label's; NaN: not known.
        self.margins = torch.full((size,), float("nan"))
        self.inputs: torch.Tensor | None = None
        self.output_grads: torch.Tensor | None = None
        self._projection: torch.Tensor | None = None

    @property
    def projects(self) -> bool:
        """Whether rows of H are kept as a projection."""
        return self._projection is not None

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        parts = [self.stamps, self.losses, self.margins, self.inputs, self.output_grads]
        return sum(part.nbytes for part in parts if part is not None)

    @staticmethod
    def width_within(size: int, width: int, limit: float) -> int:
        """Tells how many numbers of each row of H fit, at two bytes each: D, or fewer.

        Args:
            size (int): N.
            width (int): D.
            limit (float): In bytes.
        """
        fitting = limit / (2 * max(1, size))
        return width if fitting >= width else max(1, int(fitting))

    def due(self, numbers: torch.Tensor, now: int, refresh: int) -> torch.Tensor:
        """Tells which samples are to be looked at: never seen, or last seen at least so long ago.

        A look of the future is as good as none: time has been put back since (``fit(reset_time=True)``), and how old it
        is cannot be told.

        Args:
            numbers (torch.Tensor): Shape (M,).
            now (int): In the unit of the refresh.
            refresh (int): R.

        Returns:
            torch.Tensor: Boolean, shape (M,).
        """
        stamps = self.stamps[numbers]
        return (now - stamps >= refresh) | (stamps > now)

    def put(self, seen: Seen, now: int) -> None:
        """Keeps what was seen of samples; of one that is there twice, the last.

        Rows that are not finite in half precision are not kept: their samples count as never seen.

        Args:
            seen (Seen): It.
            now (int): When.
        """
        numbers, losses = seen.numbers, seen.losses.detach().to(self.device, torch.float32)
        usable = losses.isfinite().cpu()
        # Of indices that are there twice, the order of assignments is not defined.
        last = {int(number): row for row, number in enumerate(numbers.tolist())}
        rows = torch.tensor(list(last.values()), dtype=torch.int64)
        numbers, losses, usable = numbers[rows], losses[rows.to(self.device)], usable[rows]
        at = numbers.to(self.device)
        self.losses[at] = losses
        if seen.inputs is not None:
            inputs = self._shortened(seen.inputs.detach()[rows.to(seen.inputs.device)]).to(self.device, torch.float16)
            if self.inputs is None:
                self.inputs = torch.zeros(self.size, inputs.shape[1], dtype=torch.float16, device=self.device)
            self.inputs[at] = inputs
            usable &= inputs.isfinite().all(1).cpu()
        if self.keeps_grads and seen.output_grads is not None:
            grads = seen.output_grads.detach()[rows.to(seen.output_grads.device)].to(self.device, torch.float32)
            if self.output_grads is None:
                self.output_grads = torch.zeros(self.size, grads.shape[1], device=self.device)
            self.output_grads[at] = grads
            usable &= grads.isfinite().all(1).cpu()
        self.stamps[numbers] = torch.where(usable, torch.tensor(now), torch.tensor(_NEVER))

    def _shortened(self, inputs: torch.Tensor) -> torch.Tensor:
        """Projects rows of H at random, so that their products stay what they are on average."""
        width = self.width_within(self.size, inputs.shape[1], self.limit)
        if width == inputs.shape[1]:
            return inputs
        projection = self._projection
        if projection is None:
            generator = torch.Generator().manual_seed(0)
            projection = torch.randn(inputs.shape[1], width, generator=generator) / width**0.5
        self._projection = projection = projection.to(inputs.device)
        return inputs.float() @ projection

    def average_margins(self, numbers: torch.Tensor, margins: torch.Tensor, decay: float) -> None:
        """Takes margins of a visit into their samples' averages; of one that is there twice, the last.

        Args:
            numbers (torch.Tensor): Shape (n,).
            margins (torch.Tensor): Shape (n,).
            decay (float): What the average so far counts, in [0, 1).
        """
        for number, now in zip(numbers.tolist(), margins.tolist(), strict=True):
            old = float(self.margins[number])
            if now == now:
                self.margins[number] = now if old != old else decay * old + (1 - decay) * now

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps."""
        names = ("stamps", "losses", "margins", "inputs", "output_grads")
        parts: dict[str, torch.Tensor | None] = {name: getattr(self, name) for name in names}
        return {name: value.detach().cpu() for name, value in parts.items() if value is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, of as many samples; of P only if it is kept here."""
        names = ("stamps", "losses", "margins", "inputs", *(("output_grads",) if self.keeps_grads else ()))
        for name, value in ((name, state[name]) for name in names if name in state):
            on_host = name in ("stamps", "margins")
            setattr(self, name, value.clone() if on_host else value.to(self.device, copy=True))
