"""Every strategy runs every row of the table of adversarial models and batches, in lockstep with float64."""

from __future__ import annotations

import pytest
from adversarial import STRATEGIES, says
from adversarial_objective import OBJECTIVE_ROWS
from adversarial_rows import ROW_ROWS
from lockstep import run

ROWS = [*OBJECTIVE_ROWS, *ROW_ROWS]
LATE = 0.5


def _cases(rows, forms):
    for row in rows:
        for kind in row.forms if forms else row.forms[:1]:
            for strategy in STRATEGIES:
                yield pytest.param(row, kind, strategy, id=f"{row.name}-{kind}-{strategy.name}")


def check(row, kind, strategy, start):
    outcome, result = row.outcome(strategy), run(row, row.form(kind), strategy, start)
    assert result.fault is None, result.fault
    if result.refusal is not None:
        assert outcome.refusal is not None, f"refused: {result.refusal}"
        assert says(outcome.refusal, str(result.refusal)), f"refused for another reason: {result.refusal}"
        assert result.steps == 0, f"refused after {result.steps} steps: {result.refusal}"
        return
    assert outcome.trains, "accepted, without a word" if not result.warnings else f"accepted: {result.warnings}"
    assert result.steps == row.steps
    if outcome.warning is not None:
        assert any(says(outcome.warning, warning) for warning in result.warnings), "no warning"


@pytest.mark.parametrize(("row", "kind", "strategy"), _cases(ROWS, forms=True))
def test_every_step_is_that_of_the_reference_or_the_first_is_refused(row, kind, strategy):
    check(row, kind, strategy, start=0.0)


@pytest.mark.parametrize(
    ("row", "kind", "strategy"),
    [case for case in _cases(ROWS, forms=False) if case.values[0].outcome(case.values[2]).refusal is not None],
)
def test_what_is_refused_is_refused_on_the_first_batch_of_a_late_schedule(row, kind, strategy):
    check(row, kind, strategy, start=LATE)
