"""Learning rates by successive halving: the better half of them goes on to longer, or more, runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

from composer_gradmatch.studies.verdict.ledger import Ledger
from composer_gradmatch.studies.verdict.trial import Cell, Trial

__all__ = ["PLANS", "Halving", "Tuned", "choose_plan", "tune"]


@dataclass(frozen=True)
class Halving:
    """How rates are compared.

    Attributes:
        name (str): What is said of it.
        factors (tuple[float, ...]): Of the config's rate, a logarithmic grid.
        rungs (tuple[tuple[float, int], ...]): One after the other: the share of the config's duration, and the number
            of further seeds. Half of the rates, rounded up, go on from each to the next; the config's does in any
            case, in the place of the worst of them, so that it is never given up for what short runs show.
    """

    name: str
    factors: tuple[float, ...]
    rungs: tuple[tuple[float, int], ...]

    def trials(self, cell: Cell, rates: Sequence[float], rung: int, first_seed: int) -> list[Trial]:
        """Gives the trials that rates are compared by at a rung: those of its share, earlier rungs' among them."""
        share, more = self.rungs[rung]
        end = sum(seeds for _, seeds in self.rungs[:rung]) + more
        begin = end - sum(seeds for other, seeds in self.rungs[: rung + 1] if other == share)
        return [
            Trial(cell, rate, first_seed + seed, share, "validation") for rate in rates for seed in range(begin, end)
        ]

    def first_trials(self, cell: Cell, rate: float, first_seed: int) -> list[Trial]:
        """Gives the trials of the first rung, which has all rates."""
        return self.trials(cell, [rate * factor for factor in self.factors], 0, first_seed)

    def trials_like(self, cell: Cell, rate: float, first_seed: int) -> list[Trial]:
        """Gives as many trials as a cell takes, whichever rates go on."""
        rates = [rate * factor for factor in self.factors]
        trials = []
        for rung in range(len(self.rungs)):
            trials += self.trials(cell, rates, rung, first_seed)
            rates = rates[: ceil(len(rates) / 2)]
        return trials


#: From thorough to thrifty. All end with whole runs: what is best in short ones need not be.
PLANS = (
    Halving("halved over seeds", (0.25, 0.5, 1.0, 2.0, 4.0), ((1.0, 1), (1.0, 1), (1.0, 2))),
    Halving("halved over epochs", (0.25, 0.5, 1.0, 2.0, 4.0), ((0.25, 1), (0.5, 1), (1.0, 2))),
    Halving("halved over epochs, three rates", (0.5, 1.0, 2.0), ((0.5, 1), (1.0, 1))),
)


@dataclass(frozen=True)
class Tuned:
    """The rate that came out for a cell.

    Attributes:
        rate (float): The learning rate.
        accuracy (float, optional): On the validation part, in the last rung; None if all its runs failed.
        runs (int): How many were made.
        seconds (float): How long they took.
        at_edge (bool): Whether it is the smallest or largest of the grid, beyond which there may be better ones.
        error (str, optional): What all its runs failed of. Default: ``""``.
    """

    rate: float
    accuracy: float | None
    runs: int
    seconds: float
    at_edge: bool
    error: str = ""


def choose_plan(ledger: Ledger, cells: Sequence[Cell], rate: float, part: float, first_seed: int) -> Halving | None:
    """Chooses the most thorough plan that fits a part of what is left of the budget for all cells; None if none does.

    Args:
        ledger (Ledger): Of the budget.
        cells (Sequence[Cell]): To be tuned.
        rate (float): The config's learning rate.
        part (float): Of what is left.
        first_seed (int): See :func:`tune`.
    """
    for plan in PLANS:
        if ledger.affords([trial for cell in cells for trial in plan.trials_like(cell, rate, first_seed)], part):
            return plan
    return None


def tune(ledger: Ledger, plan: Halving, cell: Cell, rate: float, first_seed: int) -> Tuned:
    """Finds a cell's learning rate on the validation part.

    Rates are ranked by the accuracy at the end, a mean over seeds; between equals goes first the one with the better
    mean over the run, then the one nearer to the config's.

    Args:
        ledger (Ledger): Takes the trials.
        plan (Halving): How.
        cell (Cell): What is tuned.
        rate (float): The config's learning rate.
        first_seed (int): The seeds are this one and those after it; none of them is one that the test set sees.

    Raises:
        OutOfBudget: If it cannot be finished.
    """
    rates = grid = [rate * factor for factor in plan.factors]
    used: dict[Trial, None] = {}
    scores: dict[float, tuple[float, ...]] = {}
    best, error = rate, ""
    for rung in range(len(plan.rungs)):
        scores = {}
        ledger.take(plan.trials(cell, rates, rung, first_seed))
        for each in rates:
            trials = plan.trials(cell, [each], rung, first_seed)
            outcomes = [ledger.taken[trial] for trial in trials]
            used |= dict.fromkeys(trials)
            if failed := [outcome.error for outcome in outcomes if outcome.error]:
                error = failed[0]
                continue
            last = sum(outcome.last for outcome in outcomes) / len(outcomes)
            whole = sum(sum(o.accuracies) / len(o.accuracies) for o in outcomes) / len(outcomes)
            scores[each] = (last, whole, -abs(log(each / rate)))
        if not scores:
            seconds = sum(ledger.taken[trial].seconds for trial in used)
            return Tuned(rate, None, len(used), seconds, False, error)
        ranked = sorted(scores, key=lambda each: scores[each], reverse=True)
        best = ranked[0]
        kept = ranked[: ceil(len(rates) / 2)]
        rates = kept if rate in kept or rate not in scores else [*kept[:-1], rate]
    seconds = sum(ledger.taken[trial].seconds for trial in used)
    return Tuned(best, scores[best][0], len(used), seconds, best in (grid[0], grid[-1]))
