"""The verdict from its question to its answer; what trains is a function that is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

from composer_gradmatch.studies.time_to_accuracy import time_to_accuracy
from composer_gradmatch.studies.verdict.answer import Answer, answer, early_answer
from composer_gradmatch.studies.verdict.comparing import Compared
from composer_gradmatch.studies.verdict.halving import Halving, Tuned, choose_plan, tune
from composer_gradmatch.studies.verdict.headroom import Headroom, look_for_headroom
from composer_gradmatch.studies.verdict.ledger import Ledger, OutOfBudget
from composer_gradmatch.studies.verdict.question import Question
from composer_gradmatch.studies.verdict.rounds import Standing, play_rounds
from composer_gradmatch.studies.verdict.trial import FULL, Cell, Outcome

__all__ = ["Verdict", "conduct"]

#: The part of what the headroom leaves that learning rates may take.
_TUNING = 0.4


@dataclass(frozen=True)
class Verdict:
    """All that a verdict found.

    Attributes:
        question (Question): What was asked.
        answer (Answer): What to do.
        headroom (Headroom): What was seen first.
        plan (Halving, optional): How learning rates were chosen; None if they are the config's.
        tuned (dict[Cell, Tuned]): What came of it.
        rates (dict[Cell, float]): The learning rates that the rounds were trained with.
        standings (dict[Cell, Standing]): Of the candidates.
        ledger (Ledger): What was run.
    """

    question: Question
    answer: Answer
    headroom: Headroom
    plan: Halving | None
    tuned: dict[Cell, Tuned]
    rates: dict[Cell, float]
    standings: dict[Cell, Standing]
    ledger: Ledger

    def curves(self, cell: Cell) -> list[tuple[tuple[float, ...], list[float]]]:
        """Gives a cell's runs on the test set: accuracies, and costs as shares of the full batch's of that seed."""
        full, own = self._runs(FULL), self._runs(cell)
        return [
            (own[seed].accuracies, [seconds / full[seed].cost for seconds in own[seed].training_seconds])
            for seed in own
            if seed in full
        ]

    def _runs(self, cell: Cell) -> dict[int, Outcome]:
        rate = self.rates.get(cell, self.question.rate)
        taken = self.ledger.taken.items()
        return {
            trial.seed: outcome
            for trial, outcome in taken
            if (trial.cell, trial.rate, trial.data) == (cell, rate, "test") and not outcome.error
        }

    def full_accuracy(self) -> float:
        """The full batch's mean accuracy at the end, over the seeds that were run."""
        runs = self._runs(FULL)
        return mean(run.last for run in runs.values()) if runs else self.headroom.accuracy

    def as_json(self) -> dict[str, Any]:
        """Gives the whole of it as plain data."""
        question, found = self.question, self.answer
        recommended = {"kind": found.kind, **_cell(found.cell), "rate": self.rates.get(found.cell, question.rate)}
        recommended |= {"sentence": found.sentence, **_shown(found.compared)}
        target = self.full_accuracy() - question.margin
        return {
            "recommended": recommended,
            "candidates": [self._candidate(cell, target) for cell in question.cells],
            "full": {
                "rate": self.rates.get(FULL, question.rate),
                "accuracy": self.full_accuracy(),
                "seeds": len(self._runs(FULL)),
                "tuning": asdict(self.tuned[FULL]) if FULL in self.tuned else None,
                "time_to_accuracy": self._reached(FULL, target),
                "curve": self._curve(FULL),
            },
            "headroom": {
                "full_accuracy": self.headroom.accuracy,
                "resolution": self.headroom.resolution,
                "answers": self.headroom.answer is not None,
                "random": [
                    {**_cell(cell), "rate": question.rate, **_shown(each)}
                    for cell, each in self.headroom.compared.items()
                ],
            },
            "tuning": None if self.plan is None else _plan(self.plan),
            "margin": question.margin,
            "confidence": question.confidence,
            "comparisons": question.comparisons,
            "test_samples": question.test_samples,
            "seed": question.seed,
            "target_accuracy": target,
            "runs": len(self.ledger.taken),
            "budget_s": self.ledger.budget,
            "spent_s": self.ledger.spent,
        }

    def _candidate(self, cell: Cell, target: float) -> dict[str, Any]:
        standing = self.standings[cell]
        runs = self._runs(cell)
        looked_at = standing.compared.seeds if standing.compared else 0
        accuracies = [run.last for seed, run in runs.items() if seed < self.question.seed + looked_at]
        return {
            **_cell(cell),
            "rate": self.rates.get(cell, self.question.rate),
            "accuracy": mean(accuracies) if accuracies else None,
            "against_full": "failed" if standing.error else standing.against_full,
            "against_random": standing.against_random,
            **_shown(standing.compared),
            "further_seeds": standing.further_seeds(self.question),
            "tuning": asdict(self.tuned[cell]) if cell in self.tuned else None,
            "time_to_accuracy": self._reached(cell, target),
            "curve": self._curve(cell),
            "error": standing.error,
        }

    def _curve(self, cell: Cell) -> dict[str, list[float]]:
        """Gives the means over seeds, by evaluation."""
        curves = self.curves(cell)
        accuracies = zip(*(each for each, _ in curves), strict=False)  # Runs that stop early have fewer.
        costs = zip(*(each for _, each in curves), strict=False)
        return {"accuracy": [mean(each) for each in accuracies], "cost": [mean(each) for each in costs]}

    def _reached(self, cell: Cell, target: float) -> dict[str, Any] | None:
        curves = self.curves(cell)
        return asdict(time_to_accuracy(curves, target)) if curves else None


def _plan(plan: Halving) -> dict[str, Any]:
    return {"name": plan.name, "factors": list(plan.factors), "rungs": [list(rung) for rung in plan.rungs]}


def _cell(cell: Cell) -> dict[str, Any]:
    return {"strategy": cell[0], "keep": cell[1]}


def _shown(compared: Compared | None) -> dict[str, Any]:
    if compared is None:
        return {"seeds": 0, "cost": None, "minus_full": None, "minus_random": None}
    random = compared.minus_random
    return {
        "seeds": compared.seeds,
        "cost": asdict(compared.cost),
        "minus_full": asdict(compared.minus_full),
        "minus_random": asdict(random) if random is not None and random.pairs else None,
    }


def conduct(question: Question, ledger: Ledger) -> Verdict:
    """Looks for headroom, chooses learning rates, and runs seeds in rounds, until all is decided or spent.

    Args:
        question (Question): What is asked.
        ledger (Ledger): Takes the trials.

    Raises:
        ConfigError: If the budget is too small for a single run of the full batch, the margin is below what the test
            set can resolve, or the full batch cannot be trained.
    """
    standings = {cell: Standing(against_random="" if cell[0] == "random" else "undecided") for cell in question.cells}
    headroom = look_for_headroom(ledger, question)
    if headroom.answer is not None:
        cell = headroom.answer
        compared = headroom.compared[cell]
        standings[cell] = Standing(compared.against_full, "", compared)
        found = early_answer(cell, compared, question)
        return Verdict(question, found, headroom, None, {}, {}, standings, ledger)
    for cell, error in headroom.errors.items():
        standings[cell].error = error
    rates = dict.fromkeys((FULL, *question.cells), question.rate)
    plan, tuned = None, {}
    try:
        plan, tuned = _tune(ledger, question, standings)
        rates |= {cell: each.rate for cell, each in tuned.items()}
        play_rounds(ledger, question, rates, standings)
    except OutOfBudget:
        pass  # What has been decided stays so, and the rest is called undecided.
    found = answer(standings, question)
    if plan is None:
        more = " All of this is at the config's learning rate: to choose others did not fit the budget."
        found = replace(found, sentence=found.sentence + more)
    return Verdict(question, found, headroom, plan, tuned, rates, standings, ledger)


def _tune(
    ledger: Ledger, question: Question, standings: Mapping[Cell, Standing]
) -> tuple[Halving | None, dict[Cell, Tuned]]:
    """Chooses the learning rates of all cells by one plan, or, where none fits the budget, of none of them."""
    cells = [FULL, *(cell for cell in question.cells if not standings[cell].error)]
    first = question.tuning_seed
    plan = choose_plan(ledger, cells, question.rate, _TUNING, first)
    if plan is None:
        return None, {}
    tuned = {}
    at_most = [trial for cell in cells for trial in plan.trials_like(cell, question.rate, first)]
    sure = [trial for cell in cells for trial in plan.first_trials(cell, question.rate, first)]
    ledger.begin("learning rates", at_most, sure)
    for cell in cells:
        tuned[cell] = tune(ledger, plan, cell, question.rate, first)
        if tuned[cell].error and cell != FULL:
            standings[cell].error = tuned[cell].error
    return plan, tuned
