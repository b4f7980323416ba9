"""How old a look at a sample may be."""

from __future__ import annotations

from typing import Any

from composer.core import Time, TimeUnit

__all__ = ["check_refresh"]


def check_refresh(refresh: Any) -> Time:
    """Reads how old a look may be.

    Args:
        refresh (str | Time): A positive time in epochs or batches.

    Raises:
        ValueError: If it is none.
    """
    try:
        time = Time.from_input(refresh, TimeUnit.EPOCH)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"refresh must be a time such as '5ep', or None for a look in each step; got {refresh!r}."
        ) from error
    if time.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH) or time.value != int(time.value) or time.value < 1:
        raise ValueError(f"refresh must be a whole number of epochs ('5ep') or batches ('500ba'); got {refresh!r}.")
    return time
