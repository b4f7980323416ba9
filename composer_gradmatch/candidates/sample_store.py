"""What was last seen of each sample of a data set: its loss, its row of H, and an average of its margin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["SampleStore", "Seen"]

#: Of a sample that was never looked at.
_NEVER = -(2**62)
#: What rows of H are kept in, and what else where a value is larger than that holds: as many bytes, fewer digits.
_HALF, _WIDE = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Seen:
    """What was seen of n samples.

    Attributes:
        numbers (torch.Tensor): Which they are, int64, shape (n,), on the CPU.
        losses (torch.Tensor, optional): ℓ, shape (n,). Default: ``None``.
        inputs (torch.Tensor, optional): Rows of H, shape (n, D). Default: ``None``.
        output_grads (torch.Tensor, optional): Rows of P, shape (n, C). Default: ``None``.
    """

    numbers: torch.Tensor
    losses: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    output_grads: torch.Tensor | None = None

    def cpu(self) -> Seen:
        """Gives it on the host, as it is shared between processes."""
        return self._with(self.numbers.cpu(), lambda part: part.detach().cpu())

    def without_repetitions(self) -> Seen:
        """Leaves of a sample that is there twice the last; of assignments to the same place no order is defined."""
        if len(self.numbers.unique()) == len(self.numbers):
            return self
        last = {number: row for row, number in enumerate(self.numbers.tolist())}
        rows = torch.tensor(list(last.values()), dtype=torch.int64)
        return self._with(self.numbers[rows], lambda part: part[rows.to(part.device)])

    def _with(self, numbers: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Seen:
        parts = (self.losses, self.inputs, self.output_grads)
        return Seen(numbers, *(None if part is None else change(part) for part in parts))


def _first_of_each(numbers: torch.Tensor) -> torch.Tensor:
    """Marks the first place of each number, boolean."""
    if len(numbers.unique()) == len(numbers):
        return torch.ones(len(numbers), dtype=torch.bool)
    first = {number: row for row, number in reversed(list(enumerate(numbers.tolist())))}
    marks = torch.zeros(len(numbers), dtype=torch.bool)
    marks[list(first.values())] = True
    return marks


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
        #: In half precision, or in bfloat16 where a value is larger than that holds.
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

        Rows that are not finite are not kept: their samples count as never seen.

        Args:
            seen (Seen): It.
            now (int): When.
        """
        seen = seen.without_repetitions()
        numbers, at = seen.numbers, seen.numbers.to(self.device)
        usable = torch.ones(len(numbers), dtype=torch.bool)
        if seen.losses is not None:
            losses = seen.losses.detach().to(self.device, torch.float32)
            self.losses[at] = losses
            usable &= losses.isfinite().cpu()
        if seen.inputs is not None:
            rows = self._in_kept_form(seen)
            assert self.inputs is not None
            self.inputs[at] = rows
            usable &= rows.isfinite().all(1).cpu()
        if self.keeps_grads and seen.output_grads is not None:
            grads = seen.output_grads.detach().to(self.device, torch.float32)
            if self.output_grads is None:
                self.output_grads = torch.zeros(self.size, grads.shape[1], device=self.device)
            self.output_grads[at] = grads
            usable &= grads.isfinite().all(1).cpu()
        self.stamps[numbers] = torch.where(usable, torch.tensor(now), torch.tensor(_NEVER))

    def make_room_for(self, seen: Seen) -> None:
        """Keeps rows of H in bfloat16 from now on, if some have a finite value that half precision does not hold.

        Args:
            seen (Seen): What is to be put. Where several stores are to be equal, all of it goes through here before any
                is put, lest one store rounds twice what another rounds once.
        """
        if seen.inputs is not None:
            self._in_kept_form(seen)

    def _in_kept_form(self, seen: Seen) -> torch.Tensor:
        assert seen.inputs is not None
        inputs = self._shortened(seen.inputs.detach())
        if self.inputs is None:
            self.inputs = torch.zeros(self.size, inputs.shape[1], dtype=_HALF, device=self.device)
        rows = inputs.to(self.device, self.inputs.dtype)
        if self.inputs.dtype != _HALF or bool(rows.isfinite().all()):
            return rows
        if bool((inputs.isfinite() & inputs.to(_HALF).isinf()).any()):
            self.inputs = self.inputs.to(_WIDE)
        return inputs.to(self.device, self.inputs.dtype)

    @property
    def is_wide(self) -> bool:
        """Whether rows of H are kept in bfloat16."""
        return self.inputs is not None and self.inputs.dtype == _WIDE

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
        """Takes margins of a visit into their samples' averages; NaNs change nothing, and repetitions count each.

        Args:
            numbers (torch.Tensor): Shape (n,).
            margins (torch.Tensor): Shape (n,).
            decay (float): What the average so far counts, in [0, 1).
        """
        while len(numbers):
            first = _first_of_each(numbers)
            at, now = numbers[first], margins[first].double()
            old = self.margins[at].double()
            averages = torch.where(old.isnan(), now, decay * old + (1 - decay) * now)
            self.margins[at] = torch.where(now.isnan(), old, averages).float()
            numbers, margins = numbers[~first], margins[~first]

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
