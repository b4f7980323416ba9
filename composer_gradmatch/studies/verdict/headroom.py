"""Is there anything to gain: the full batch, and random at several keeps, before anything dear is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean
from typing import NoReturn

from composer_gradmatch.studies.verdict.bounds import LOOKS
from composer_gradmatch.studies.verdict.comparing import Compared, compare
from composer_gradmatch.studies.verdict.ledger import Ledger, OutOfBudget
from composer_gradmatch.studies.verdict.question import Question
from composer_gradmatch.studies.verdict.trial import FULL, Cell, Outcome, Trial
from composer_gradmatch.train.config import ConfigError

__all__ = ["CHEAP", "Headroom", "look_for_headroom"]

#: Random at this share of the full batch's cost leaves little to gain by choosing.
CHEAP = 1 / 3
#: The part of the budget that the headroom may take, and the looks that it may have.
_PART, _LOOKS = 0.25, LOOKS[:3]


@dataclass
class Headroom:
    """What was seen, at the config's learning rate.

    Attributes:
        accuracy (float): The full batch's on the test set, a mean over its seeds.
        resolution (float): The least margin that the test set can resolve.
        compared (dict[Cell, Compared]): Random's cells, each at its last look; empty if there was none.
        answer (Cell, optional): The cheapest of them that is within the margin at a third of the cost or less; None
            if there is none. Default: ``None``.
        errors (dict[Cell, str]): What cells failed of. Default: ``{}``.
    """

    accuracy: float
    resolution: float
    compared: dict[Cell, Compared] = field(default_factory=dict)
    answer: Cell | None = None
    errors: dict[Cell, str] = field(default_factory=dict)


def look_for_headroom(ledger: Ledger, question: Question) -> Headroom:
    """Runs the full batch and random, and looks whether random at a third of the cost is already within the margin.

    Args:
        ledger (Ledger): Takes the trials.
        question (Question): What is asked.

    Raises:
        ConfigError: If the budget is too small for a single run of the full batch, that fails, or the margin is below
            what the test set can resolve.
    """
    first = Trial(FULL, question.rate, question.seed)
    ledger.begin("headroom", [first], [first])
    if not ledger.fits(first):
        _refuse_budget(ledger.estimate([first]), ledger)
    (outcome,) = ledger.take([first])
    if outcome.error:
        raise ConfigError(f"the full batch's first run failed, and all is measured by it: {outcome.error}")
    if ledger.spent > ledger.budget:
        _refuse_budget(outcome.seconds, ledger)
    headroom = Headroom(outcome.last, _resolution(outcome.last, question.test_samples))
    _check_margin(headroom, question)

    available = max(ledger.left * _PART, 0.0)
    cells = question.randoms
    for seeds in _LOOKS:
        trials = _trials(cells, seeds, question)
        while cells and ledger.estimate(trials) > available:
            cells = cells[:-1]  # The dearest.
            trials = _trials(cells, seeds, question)
        if not cells:
            break
        cost = ledger.estimate(trials)
        available -= cost
        ledger.begin("headroom", trials, trials)
        try:
            results = _by_cell(ledger, trials)
        except OutOfBudget:
            break
        headroom.errors = {cell: o.error for cell, runs in results.items() for o in runs if o.error}
        if FULL in headroom.errors:
            raise ConfigError(f"a run of the full batch failed, and all is measured by it: {headroom.errors[FULL]}")
        cells = [cell for cell in cells if cell not in headroom.errors]
        headroom.accuracy = mean(run.last for run in results[FULL])
        headroom.compared |= {cell: compare(results, cell, seeds, question.early_alpha, question) for cell in cells}
        cheap = {cell: headroom.compared[cell] for cell in cells if headroom.compared[cell].cost.mean <= CHEAP}
        within = [cell for cell, each in cheap.items() if each.against_full in ("better", "non-inferior")]
        if within:
            headroom.answer = min(within, key=lambda cell: cheap[cell].cost.mean)
            return headroom
        if not any(each.minus_full.mean > -question.margin for each in cheap.values()):
            break
    return headroom


def _trials(cells: list[Cell], seeds: int, question: Question) -> list[Trial]:
    seeds_of = range(question.seed, question.seed + seeds)
    return [Trial(cell, question.rate, seed) for seed in seeds_of for cell in (FULL, *cells)]


def _by_cell(ledger: Ledger, trials: list[Trial]) -> dict[Cell, list[Outcome]]:
    results: dict[Cell, list[Outcome]] = {}
    for trial, outcome in zip(trials, ledger.take(trials), strict=True):
        results.setdefault(trial.cell, []).append(outcome)
    return results


def _refuse_budget(run: float, ledger: Ledger) -> NoReturn:
    raise ConfigError(
        f"--budget {ledger.budget:.0f}s is too small for a single run of the full batch, which takes about {run:.0f} s "
        f"here, beside the {ledger.spent:.0f} s that were spent. A verdict takes some {LOOKS[0]} to {LOOKS[3]} runs of "
        f"each candidate, and those that learning rates are chosen by: try --budget {max(1, round(run))}m or more, or "
        "fewer candidates."
    )


def _resolution(accuracy: float, samples: int) -> float:
    """Gives the standard error of an accuracy on so many test samples; one sample, where it is smaller."""
    return max((accuracy * (1 - accuracy) / samples) ** 0.5, 1 / samples)


def _check_margin(headroom: Headroom, question: Question) -> None:
    if question.margin < headroom.resolution:
        raise ConfigError(
            f"--margin {question.margin:g} is below what the test set can resolve: on {question.test_samples:,} "
            f"samples, the standard error √(p(1 − p)/n) of the full batch's accuracy of {headroom.accuracy:.4f}, or "
            f"one sample, is {headroom.resolution:.4f}. Use --margin {_round_up(headroom.resolution):g} or more, or a "
            "larger test set."
        )


def _round_up(value: float) -> float:
    return -(-value // 0.0005) * 0.0005
