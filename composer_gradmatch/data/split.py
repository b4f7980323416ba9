"""The two parts that every data set has."""

from __future__ import annotations

__all__ = ["check_split"]


def check_split(split: str) -> None:
    """Raises ValueError if a split is neither ``"train"`` nor ``"test"``."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
