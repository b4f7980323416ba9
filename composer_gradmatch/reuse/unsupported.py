"""Why a model's activations cannot be used again."""

from __future__ import annotations

__all__ = ["UndecidedError", "UnsupportedError"]


class UnsupportedError(Exception):
    """The activations of a forward pass cannot be used for the picks' backward pass; the message says why."""


class UndecidedError(UnsupportedError):
    """They cannot on this minibatch, which shows nothing of others."""
