"""Every strategy runs every row of the table of adversarial models and batches, in lockstep with float64."""

from __future__ import annotations

import pytest
import torch
from adversarial import STRATEGIES, says
from adversarial_heads import HEAD_ROWS
from adversarial_objective import OBJECTIVE_ROWS
from adversarial_rows import ROW_ROWS
from adversarial_small import SMALL_ROWS
from adversarial_trace import TRACE_ROWS
from lockstep import resumable, run

from composer_gradmatch.algorithms.subset_backprop import SubsetBackprop

ROWS = [*OBJECTIVE_ROWS, *ROW_ROWS, *HEAD_ROWS, *TRACE_ROWS, *SMALL_ROWS]
LATE = 0.5


def _cases(only_first_form=False, only_refusals=False):
    for row in ROWS:
        for strategy in STRATEGIES:
            # Capturing a pass takes long, and containers matter to it where another algorithm replaces their items.
            first = only_first_form or (strategy.reuses and row.other is None)
            for kind in row.forms[:1] if first else row.forms:
                if not only_refusals or row.outcome(strategy).refusal is not None:
                    name = f"{row.name}-{kind}-{strategy.name}"
                    yield pytest.param(row, kind, strategy, id=name, marks=_marks(strategy))


def _marks(strategy):
    return pytest.mark.slow if strategy.slow else ()


BY_STRATEGY = [pytest.param(each, id=each.name, marks=_marks(each)) for each in STRATEGIES]


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


RESUMED = (
    "distance to the start, in microbatches",
    "class weights",
    "targets are 0-d tensors, in microbatches",
    "sorted after selection, in microbatches",
    "inputs normalised in place, in microbatches",
    "follows: Momentum",
    "BatchNorm and a last minibatch of 3",
)


@pytest.mark.parametrize("strategy", BY_STRATEGY)
@pytest.mark.parametrize("row", [row for row in ROWS if row.name in RESUMED], ids=lambda row: row.name)
def test_a_resumed_run_is_the_uninterrupted_one(row, strategy, tmp_path):
    form = row.form(row.forms[0])
    start, whole = resumable(row, form, strategy, "2ep")
    resumable(row, form, strategy, "2ep", save_folder=str(tmp_path), save_interval="1ba")
    _, resumed = resumable(row, form, strategy, "2ep", load_path=str(next(tmp_path.glob("ep1-ba4-*.pt"))))
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    # A reused pass is verified again after a resumption, by two passes, which round differently.
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if strategy.reuses else {"rtol": 0, "atol": 0}
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], **tolerance)


def test_names_tell_rows_apart():
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert set(RESUMED) <= set(names)


@pytest.mark.parametrize("strategy", BY_STRATEGY)
@pytest.mark.parametrize("fault", ["another target", "another sample", "a trace", "too many"])
def test_the_lockstep_sees_a_fault(strategy, fault, monkeypatch):
    """A table that cannot fail would show nothing."""
    row = next(row for row in ROWS if row.name == "class weights")
    after = SubsetBackprop._after_dataloader

    def tampered(self, state, logger):
        after(self, state, logger)
        x, y = state.batch
        if fault == "another target":
            state.batch = x, y.roll(1, 0)
        elif fault == "another sample":
            state.batch = x.roll(1, 0), y
        elif fault == "a trace":
            state.model.class_weights.add_(1e-3)
        else:
            state.batch = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])

    monkeypatch.setattr(SubsetBackprop, "_after_dataloader", tampered)
    result = run(row, row.form("tuple"), strategy)
    assert result.fault is not None or result.refusal is not None
    assert result.steps <= 1
