"""What the sources of candidates have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from composer.core import State

from composer_gradmatch.batches.reader import BatchReader
from composer_gradmatch.forward.sample_checks import Rows
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost import Passes, step_cost
from composer_gradmatch.rules.picks import Picks

if TYPE_CHECKING:
    from composer_gradmatch.reuse.single_pass import SinglePass

__all__ = ["Source"]


class Source:
    """Gives rules that look at nothing their candidates; what looks overrides it.

    A step calls :meth:`begin_step`, :meth:`look`, :meth:`serve` with what was picked, :meth:`end_selection` whatever
    came of it, and, if :attr:`serves` is true, :meth:`end_step` after the backward pass.

    Args:
        reader (BatchReader): Reads the run's batches.
    """

    #: The one forward pass, where the source makes but one.
    single: SinglePass | None = None

    def __init__(self, reader: BatchReader) -> None:
        self.reader = reader

    @property
    def passes(self) -> Passes:
        """The forward passes over the whole minibatch of a step that has just been selected for."""
        return 0

    def cost(self, share: float) -> float:
        """Tells what the step that has just been selected for costs, in steps on the whole minibatch.

        Args:
            share (float): m/M.
        """
        return step_cost(self.passes, share)

    @property
    def metrics(self) -> dict[str, float]:
        """What to log of the look."""
        return {}

    @property
    def serves(self) -> bool:
        """Whether the step that is being made has something to end."""
        return False

    def reset_fit(self, state: State) -> None:
        """Forgets what belongs to one ``fit``, in which modules may be replaced."""

    def begin_step(self) -> None:
        """Lets go of what a step left that an error has ended."""

    def look(self, state: State, num_samples: int) -> Candidates:
        """Looks at the samples of ``state.batch``.

        Args:
            state (State): The run's state.
            num_samples (int): M.
        """
        return Candidates(num_samples, labels=self.labels_of(state.batch, num_samples))

    def labels_of(self, batch: Any, num_samples: int) -> Callable[[], torch.Tensor]:
        """Gives what reads the classes of a batch's samples, for a rule that asks for them."""
        return lambda: self.reader.labels(batch, num_samples)

    def rehearse(self, state: State, num_samples: int) -> Candidates:
        """Looks as :meth:`look` would on any later batch, for what may fail."""
        return self.look(state, num_samples)

    def rows_of(self, state: State, batch: Any, num_samples: int) -> Rows | None:
        """Tells what is looked at of the samples of a small batch, to show whose is which; None if that is nothing."""
        return None

    def serve(self, state: State, picks: Picks) -> None:
        """Takes note of what was picked; ``state.batch`` is that of the picks."""

    def end_selection(self) -> None:
        """Lets go of a look that nothing was picked from."""

    def end_step(self) -> None:
        """Lets go of what the step was served."""
