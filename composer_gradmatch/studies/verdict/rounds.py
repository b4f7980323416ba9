"""Seeds in rounds, the same for all, until each candidate is decided or the budget is spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from composer_gradmatch.studies.verdict.bounds import LOOKS, further_seeds
from composer_gradmatch.studies.verdict.comparing import Compared, compare
from composer_gradmatch.studies.verdict.ledger import Ledger
from composer_gradmatch.studies.verdict.question import Question
from composer_gradmatch.studies.verdict.trial import FULL, Cell, Outcome, Trial
from composer_gradmatch.train.config import ConfigError

__all__ = ["Standing", "play_rounds"]


@dataclass
class Standing:
    """How far a candidate has come.

    Attributes:
        against_full (str): See :class:`.Compared`; what is decided stays so. Default: ``"undecided"``.
        against_random (str): The same. Default: ``"undecided"``, ``""`` for random.
        compared (Compared, optional): At its last look; None if there was none. Default: ``None``.
        error (str): What a run of it failed of. Default: ``""``.
    """

    against_full: str = "undecided"
    against_random: str = "undecided"
    compared: Compared | None = None
    error: str = ""

    @property
    def is_open(self) -> bool:
        """Whether more seeds could tell more."""
        return not self.error and "undecided" in (self.against_full, self.against_random)

    @property
    def next_look(self) -> int | None:
        """The number of seeds that it is looked at with next; None behind the last look."""
        seen = 0 if self.compared is None else self.compared.seeds
        return next((seeds for seeds in LOOKS if seeds > seen), None)

    def further_seeds(self, question: Question) -> int | None:
        """Estimates the further seeds that decide it against the full batch; None if none, or too many, would."""
        if self.compared is None or self.against_full != "undecided":
            return None
        distance = abs(self.compared.minus_full.mean + question.margin)
        return further_seeds(distance, self.compared.spread, self.compared.seeds, question.alpha)


def play_rounds(
    ledger: Ledger, question: Question, rates: Mapping[Cell, float], standings: dict[Cell, Standing]
) -> None:
    """Runs candidates, the full batch and random with the same seeds, look by look.

    A round takes all candidates that are at the same look, the ones nearest to a decision first, as far as all of it
    fits the budget; those that do not fit, or no longer do within the round, wait, and others go on.

    Args:
        ledger (Ledger): Takes the trials.
        question (Question): What is asked.
        rates (Mapping[Cell, float]): The learning rate of each cell, the full batch's among them.
        standings (dict[Cell, Standing]): Of the candidates; changed here.

    Raises:
        ConfigError: If a run of the full batch fails.
        OutOfBudget: If runs have become dearer than expected within a round.
    """
    while active := _next_round(ledger, question, rates, standings):
        seeds, cells = active
        trials = _trials(cells, rates, seeds, question, standings)
        ledger.begin(f"seeds, up to {seeds}", trials, trials)
        for seed in range(question.seed, question.seed + seeds):
            trials = _trials(cells, rates, seeds, question, standings)
            # Where runs have become dearer, rather a few looks than none.
            while len(cells) > 1 and not ledger.affords(trials):
                cells.pop()
                trials = _trials(cells, rates, seeds, question, standings)
            ledger.take(trial for trial in trials if trial.seed == seed)
        results: dict[Cell, list[Outcome]] = {}
        for trial in trials:
            results.setdefault(trial.cell, []).append(ledger.taken[trial])
        errors = {cell: run.error for cell, runs in results.items() for run in runs if run.error}
        if FULL in errors:
            raise ConfigError(f"a run of the full batch failed, and all is measured by it: {errors[FULL]}")
        results = {cell: runs for cell, runs in results.items() if cell not in errors}
        for cell, error in errors.items():
            standings[cell].error = error
        for cell in cells:
            if cell in results:
                _update(standings[cell], compare(results, cell, seeds, question.alpha, question))


def _next_round(
    ledger: Ledger, question: Question, rates: Mapping[Cell, float], standings: Mapping[Cell, Standing]
) -> tuple[int, list[Cell]] | None:
    """Gives the earliest look that fits the budget, and who is there for it; None if none does."""
    waiting: dict[int, list[Cell]] = {}
    for cell in question.cells:
        seeds = standings[cell].next_look
        if standings[cell].is_open and seeds is not None:
            waiting.setdefault(seeds, []).append(cell)
    for seeds, cells in sorted(waiting.items()):
        active: list[Cell] = []
        for cell in sorted(cells, key=lambda cell: _farness(cell, standings[cell], ledger, rates, question)):
            if ledger.affords(_trials([*active, cell], rates, seeds, question, standings)):
                active.append(cell)
        if active:
            return seeds, active
    return None


def _update(standing: Standing, compared: Compared) -> None:
    standing.compared = compared
    if standing.against_full == "undecided":
        standing.against_full = compared.against_full
    if standing.against_random == "undecided":
        standing.against_random = compared.against_random


def _trials(
    active: list[Cell],
    rates: Mapping[Cell, float],
    seeds: int,
    question: Question,
    standings: Mapping[Cell, Standing],
) -> list[Trial]:
    """Gives a round's trials, seed by seed, so that pairs are made one after the other on the same machine."""
    compared = any(standings[cell].against_random == "undecided" for cell in active)
    randoms = [cell for cell in question.randoms if compared and not standings[cell].error]
    cells = dict.fromkeys((FULL, *randoms, *active))
    return [Trial(cell, rates[cell], question.seed + seed) for seed in range(seeds) for cell in cells]


def _farness(
    cell: Cell, standing: Standing, ledger: Ledger, rates: Mapping[Cell, float], question: Question
) -> tuple[bool, float]:
    """Orders candidates: those not decided against the full batch first, by what a decision is expected to cost."""
    further = LOOKS[0] if standing.compared is None else standing.further_seeds(question)
    cost = ledger.estimate([Trial(cell, rates[cell], -1)])
    return standing.against_full != "undecided", float("inf") if further is None else further * cost
