"""The budget: what has been spent, what the next runs would cost, and whether they fit.

Everything is reckoned from the outcomes in the order in which they are asked for. So a verdict that was stopped asks
once more for the same trials, is given those that are on record, and decides what it decided before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

from composer_gradmatch.studies.verdict.trial import FULL, Cell, Outcome, Source, Trial

__all__ = ["Ledger", "OutOfBudget"]


class OutOfBudget(Exception):  # It ends a stage, and is no error.
    """The next run does not fit any more."""


def _reserve(budget: float) -> float:
    """Gives what is kept for the start, the report, and runs that take longer: a twentieth, but of seconds more."""
    return min(max(0.05 * budget, 20.0), 0.1 * budget)


class Ledger:
    """Takes trials from a source and keeps account of them.

    Args:
        source (Callable): See :data:`.Source`.
        budget (float): Seconds.
        guess (Callable): ``guess(cell)``: what a whole run of a cell costs in whole runs of the full batch, for
            cells that none was made of.
        full_seconds (float): What a whole run of the full batch takes, as far as is known before one is made.
        spent (float, optional): Seconds that were spent before. Default: ``0.0``.
        tell (Callable, optional): ``tell(ledger)``, called after each trial. Default: ``None``.
        recorded (Callable, optional): ``recorded(trial)``: whether the source has it already. What has been paid for,
            with a smaller budget, say, is not refused. Default: none is.
        expect (Callable, optional): ``expect(trials)``, called before each trial with those that are taken next in any
            case, and fit, for a source that makes several at a time. Default: ``None``.

    Attributes:
        stage (str): What is being done.
        taken (dict[Trial, Outcome]): In the order in which they were asked for.
        spent (float): Seconds.
    """

    def __init__(
        self,
        source: Source,
        budget: float,
        guess: Callable[[Cell], float],
        full_seconds: float,
        spent: float = 0.0,
        tell: Callable[[Ledger], None] | None = None,
        recorded: Callable[[Trial], bool] = lambda trial: False,
        expect: Callable[[list[Trial]], None] | None = None,
    ) -> None:
        self.budget, self.spent, self.stage = budget, spent, ""
        self._reserve = _reserve(budget) if budget < float("inf") else 0.0
        self.taken: dict[Trial, Outcome] = {}
        self._begun: tuple[list[Trial], float] = ([], 0.0)
        self._sure: list[Trial] = []
        self._by_cell: dict[Cell, list[tuple[Trial, Outcome]]] = {}
        self._recorded, self._expect = recorded, expect
        self._source, self._guess, self._full_seconds, self._tell = source, guess, full_seconds, tell

    @property
    def left(self) -> float:
        """Seconds left to plan with."""
        return self.budget - self._reserve - self.spent

    @property
    def to_go(self) -> float:
        """Seconds that the stage still takes, as its runs have taken so far; which ones they are may have changed."""
        trials, spent = self._begun
        return max(0.0, sum(map(self._seconds, trials)) - (self.spent - spent))

    def begin(self, stage: str, trials: Iterable[Trial], sure: Iterable[Trial]) -> None:
        """Begins a stage, for whom it is told.

        Args:
            stage (str): What is going to be done.
            trials (Iterable[Trial]): What it takes at most.
            sure (Iterable[Trial]): What it takes whatever comes out, in this order.
        """
        new = [trial for trial in dict.fromkeys(trials) if trial not in self.taken]
        self.stage, self._begun, self._sure = stage, (new, self.spent), list(sure)

    def estimate(self, trials: Iterable[Trial]) -> float:
        """Estimates the seconds that trials would take: those that are not taken yet, each once."""
        return sum(self._seconds(trial) for trial in dict.fromkeys(trials) if trial not in self.taken)

    def _seconds(self, trial: Trial) -> float:
        def known(cell: Cell) -> list[float]:
            done = self._by_cell.get(cell, [])
            whole = [(each, outcome) for each, outcome in done if each.share == trial.share] or done
            return [outcome.seconds * trial.share / each.share for each, outcome in whole]

        if own := known(trial.cell):
            return median(own)
        full = known(FULL)
        return self._guess(trial.cell) * (median(full) if full else self._full_seconds * trial.share)

    def affords(self, trials: Iterable[Trial], part: float = 1.0) -> bool:
        """Tells whether trials fit what is left of the budget, or a part of that."""
        return self.estimate(trials) <= self.left * part

    def fits(self, trial: Trial) -> bool:
        """Tells whether one more trial can be begun: it may take half of what is kept in reserve."""
        return self._seconds(trial) <= self.left + self._reserve / 2

    def _fitting(self, trials: Iterable[Trial]) -> list[Trial]:
        """Gives the first of those trials that are not taken, as far as they fit together."""
        room, found = self.left + self._reserve / 2, []
        for trial in dict.fromkeys(trials):
            if trial not in self.taken:
                room -= self._seconds(trial)
                if room < 0 and found:
                    break
                found.append(trial)
        return found

    def take(self, trials: Iterable[Trial]) -> list[Outcome]:
        """Takes trials, one after the other.

        Raises:
            OutOfBudget: If one does not fit, because those before it took longer than was to be expected.
        """
        trials = list(trials)
        for place, trial in enumerate(trials):
            if trial in self.taken:
                continue
            if not self.fits(trial) and not self._recorded(trial):
                raise OutOfBudget
            if self._expect:
                self._expect(self._fitting([trial, *trials[place:], *self._sure])[1:])
            outcome = self._source(trial)
            self.taken[trial] = outcome
            self.spent += outcome.seconds
            if not outcome.error:
                self._by_cell.setdefault(trial.cell, []).append((trial, outcome))
            if self._tell:
                self._tell(self)
        return [self.taken[trial] for trial in trials]
