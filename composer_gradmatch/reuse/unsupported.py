"""Why a model's activations cannot be used again."""

from __future__ import annotations

__all__ = ["UndecidedError", "UnsupportedError", "first_line"]


class UnsupportedError(Exception):
    """The activations of a forward pass cannot be used for the picks' backward pass; the message says why."""


class UndecidedError(UnsupportedError):
    """They cannot on this minibatch, which shows nothing of others."""


def first_line(error: BaseException) -> str:
    """Gives an error's type, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
