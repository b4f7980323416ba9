"""The progress line: what is being done, how much of the budget is gone, and how long this step still takes."""

from __future__ import annotations

from types import TracebackType

from tqdm.auto import tqdm

from composer_gradmatch.studies.verdict.ledger import Ledger

__all__ = ["Progress", "in_words"]


def in_words(seconds: float) -> str:
    """Writes a time as 1h05m, 3m20s or 12s."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


class Progress:
    """A bar over the budget's seconds.

    Args:
        budget (float, optional): Seconds; None where there is no limit.
        at_once (int): Runs at a time.
    """

    def __init__(self, budget: float | None, at_once: int) -> None:
        self._at_once = at_once
        form = "{desc} {bar:20}{postfix}" if budget else "{desc}{postfix}"
        self._bar = tqdm(total=budget, desc="verdict", bar_format=form, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def tell(self, ledger: Ledger) -> None:
        """Shows how far a ledger is."""
        self._bar.set_description_str(ledger.stage, refresh=False)
        limit = f" of {in_words(ledger.budget)}" if self._bar.total else ""
        self._bar.set_postfix_str(
            f"{len(ledger.taken)} runs, {in_words(ledger.spent)}{limit} spent; this takes about "
            f"{in_words(ledger.to_go / self._at_once)} more",
            refresh=False,
        )
        self._bar.n = min(ledger.spent, ledger.budget)
        self._bar.refresh()
