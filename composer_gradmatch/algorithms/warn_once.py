"""Warnings of which one a run is enough."""

from __future__ import annotations

import warnings

__all__ = ["WarnOnce"]


class WarnOnce:
    """Gives each warning once until it is reset.

    Args:
        owner (str): What the warnings are of.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._given: set[str] = set()

    def reset(self) -> None:
        """Lets all warnings be given again."""
        self._given = set()

    def __call__(self, warning: str) -> None:
        """Gives a warning, if it is a new one."""
        if warning not in self._given:
            self._given.add(warning)
            warnings.warn(f"{self.owner}: {warning}", stacklevel=2)
