"""From where the candidates stand to what to do: a recommendation and its sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from composer_gradmatch.studies.verdict.bounds import LOOKS
from composer_gradmatch.studies.verdict.comparing import Compared
from composer_gradmatch.studies.verdict.question import Question
from composer_gradmatch.studies.verdict.rounds import Standing
from composer_gradmatch.studies.verdict.trial import FULL, Cell

__all__ = ["Answer", "answer", "early_answer", "named"]

_WITHIN = ("better", "non-inferior")


@dataclass(frozen=True)
class Answer:
    """What to train with.

    Attributes:
        kind (str): ``"switch"``: to a strategy that selects; ``"random"``: to random parts; ``"full"``: nothing is
            both within the margin and cheaper; or ``"undecided"``.
        cell (Cell): The strategy and keep; the full batch's where nothing is to be switched on.
        sentence (str): The same in words.
        compared (Compared, optional): What it rests on; None for the full batch. Default: ``None``.
    """

    kind: str
    cell: Cell
    sentence: str
    compared: Compared | None = None


def named(cell: Cell) -> str:
    """Names a cell in a sentence."""
    return "the full batch" if cell == FULL else f"{cell[0]} at keep {cell[1]:g}"


def early_answer(cell: Cell, compared: Compared, question: Question) -> Answer:
    """Gives the answer where the headroom has it: random is enough."""
    return Answer("random", cell, f"{_switch_to(cell, compared, question)} Nothing dearer was run.", compared)


def answer(standings: Mapping[Cell, Standing], question: Question) -> Answer:
    """Gives the cheapest candidate that is decided to be within the margin, and saves time.

    Args:
        standings (Mapping[Cell, Standing]): Of all candidates.
        question (Question): What was asked.
    """
    within = {
        cell: standing.compared
        for cell, standing in standings.items()
        if standing.against_full in _WITHIN and standing.compared is not None and not standing.error
    }
    saving = {cell: compared for cell, compared in within.items() if compared.cost.high < 1}
    undecided = [cell for cell, each in standings.items() if each.against_full == "undecided" and not each.error]
    if saving:
        cell = min(saving, key=lambda cell: saving[cell].cost.mean)
        cheaper = [other for other in undecided if _may_be_cheaper(standings[other], saving[cell])]
        more = f" Undecided, and perhaps cheaper: {_listed(cheaper, standings, question)}." if cheaper else ""
        kind = "random" if cell[0] == "random" else "switch"
        return Answer(kind, cell, _switch_to(cell, saving[cell], question) + more, saving[cell])
    if undecided:
        return Answer(
            "undecided",
            FULL,
            f"Undecided: within the budget no candidate could be shown to be within {question.margin:g} of the full "
            f"batch's accuracy and to take less time. Keep the full batch until it is. Not decided: "
            f"{_listed(undecided, standings, question)}.",
        )
    if within:
        listed = ", ".join(f"{named(cell)} ({compared.cost} of its time)" for cell, compared in within.items())
        return Answer("full", FULL, f"Keep the full batch: what is as accurate saves no time: {listed}.")
    failed = [cell for cell, standing in standings.items() if standing.error]
    if failed and len(failed) == len(standings):
        return Answer("full", FULL, "Keep the full batch: no candidate could be trained with; see their errors.")
    also = f" (runs of {', '.join(map(named, failed))} failed)" if failed else ""
    return Answer(
        "full",
        FULL,
        f"Keep the full batch: every candidate is less accurate by more than {question.margin:g}{also}, at "
        f"{question.confidence:.0%} confidence over all comparisons.",
    )


def _may_be_cheaper(standing: Standing, chosen: Compared) -> bool:
    return standing.compared is None or standing.compared.cost.low < chosen.cost.mean


def _switch_to(cell: Cell, compared: Compared, question: Question) -> str:
    cost, difference = compared.cost, compared.minus_full
    what = f"Train on random parts: {named(cell)}" if cell[0] == "random" else f"Switch on {named(cell)}: it"
    return (
        f"{what} saves {1 - cost.mean:.0%} of the full batch's training time ({1 - cost.high:.0%} to "
        f"{1 - cost.low:.0%}) within a margin of {question.margin:g} in accuracy: the difference is "
        f"{difference} over {compared.seeds} seeds, at {question.confidence:.0%} confidence over all comparisons."
    )


def _listed(cells: list[Cell], standings: Mapping[Cell, Standing], question: Question) -> str:
    looked_at = [cell for cell in cells if standings[cell].compared is not None]
    others = [named(cell) for cell in cells if cell not in looked_at]
    listed = [f"{named(cell)} ({_what_would_decide(standings[cell], question)})" for cell in looked_at]
    if others:
        listed.append(f"{', '.join(others)} (not looked at; the first look takes {LOOKS[0]} seeds)")
    return ", ".join(listed)


def _what_would_decide(standing: Standing, question: Question) -> str:
    further = standing.further_seeds(question)
    if not further or standing.compared is None:
        return "it lies on the margin: no number of seeds would"
    most = (
        f", more than the {LOOKS[-1]} that a verdict goes up to"
        if standing.compared.seeds + further > LOOKS[-1]
        else ""
    )
    return f"about {further} further seeds would{most}"
