"""Every strategy runs every row of the table of adversarial models and batches, in lockstep with float64."""

from __future__ import annotations

import pytest
from adversarial import STRATEGIES, says
from adversarial_objective import OBJECTIVE_ROWS
from adversarial_rows import ROW_ROWS
from adversarial_small import SMALL_ROWS
from adversarial_trace import TRACE_ROWS
from lockstep import run

ROWS = [*OBJECTIVE_ROWS, *ROW_ROWS, *TRACE_ROWS, *SMALL_ROWS]
LATE = 0.5


def _cases(only_first_form=False, only_refusals=False):
    for row in ROWS:
        for kind in row.forms[:1] if only_first_form else row.forms:
            for strategy in STRATEGIES:
                if not only_refusals or row.outcome(strategy).refusal is not None:
                    yield pytest.param(row, kind, strategy, id=f"{row.name}-{kind}-{strategy.name}")


def check(row, kind, strategy, start):
    outcome, result = row.outcome(strategy), run(row, row.form(kind), strategy, start)
    assert result.fault is None, result.fault
    if result.refusal is not None:
        assert outcome.refusal is not None, f"refused: {result.refusal}"
        assert says(outcome.refusal, str(result.refusal)), f"refused for another reason: {result.refusal}"
        assert result.steps == 0, f"refused after {result.steps} steps: {result.refusal}"
        return
    assert outcome.trains, f"accepted, with the warnings {result.warnings}"
    assert result.steps == row.steps
    if outcome.warning is not None:
        assert any(says(outcome.warning, warning) for warning in result.warnings), f"warned only of {result.warnings}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_reference_is_right_where_nothing_is_selected(row):
    for kind in row.forms:
        result = run(row, row.form(kind), None)
        assert (result.steps, result.refusal, result.fault) == (row.steps, None, None)


@pytest.mark.parametrize(("row", "kind", "strategy"), _cases())
def test_every_step_is_that_of_the_reference_or_the_first_is_refused(row, kind, strategy):
    check(row, kind, strategy, start=0.0)


@pytest.mark.parametrize(("row", "kind", "strategy"), _cases(only_first_form=True, only_refusals=True))
def test_what_is_refused_is_refused_on_the_first_batch_of_a_late_schedule(row, kind, strategy):
    check(row, kind, strategy, start=LATE)
