"""Candidates of a rule that does not look at every minibatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from composer.core import State

from composer_gradmatch.candidates.source import Source
from composer_gradmatch.forward.sample_checks import Rows
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost import Passes
from composer_gradmatch.rules.picks import Picks

__all__ = ["WhenAsked"]


class WhenAsked(Source):
    """Looks by another source in the steps in which the rule wants it.

    Args:
        source (Source): Looks.
        asked (Callable): Tells whether the next minibatch is to be looked at.
        planned_passes (int): Forward passes of a step that looks, until one was made.
    """

    def __init__(self, source: Source, asked: Callable[[], bool], planned_passes: Passes) -> None:
        self.source, self.asked = source, asked
        #: Of the last step that looked.
        self.passes_of_a_look: Passes = planned_passes
        self._looked = False

    @property
    def passes(self) -> Passes:
        """Those of the other source, or none: see :class:`.Source`."""
        return self.source.passes if self._looked else 0

    @property
    def serves(self) -> bool:
        """Whether the other source serves the step: see :class:`.Source`."""
        return self.source.serves

    def reset_fit(self, state: State) -> None:
        """Lets the other source forget: see :class:`.Source`."""
        self._looked = False
        self.source.reset_fit(state)

    def begin_step(self) -> None:
        """Lets the other source begin: see :class:`.Source`."""
        self._looked = False
        self.source.begin_step()

    def look(self, state: State, num_samples: int) -> Candidates:
        """Looks, if it is asked to: see :class:`.Source`."""
        self._looked = self.asked()
        return self.source.look(state, num_samples) if self._looked else Candidates(num_samples)

    def rehearse(self, state: State, num_samples: int) -> Candidates:
        """Looks: see :class:`.Source`."""
        return self.source.rehearse(state, num_samples)

    def rows_of(self, state: State, batch: Any, num_samples: int) -> Rows | None:
        """Looks: see :class:`.Source`."""
        return self.source.rows_of(state, batch, num_samples)

    def serve(self, state: State, picks: Picks) -> None:
        """Lets the other source serve the picks that it has shown: see :class:`.Source`."""
        if self._looked:
            self.source.serve(state, picks)
            self.passes_of_a_look = self.source.passes

    def end_selection(self) -> None:
        """Lets the other source end: see :class:`.Source`."""
        self.source.end_selection()

    def end_step(self) -> None:
        """Lets the other source end: see :class:`.Source`."""
        self.source.end_step()
