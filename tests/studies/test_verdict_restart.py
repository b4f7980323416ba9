"""A verdict that is killed goes on, and comes to the very same."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from made_up_training import MadeUp, ask

from composer_gradmatch.studies.report import write_report
from composer_gradmatch.studies.store import Record, Run, Store
from composer_gradmatch.studies.verdict.ledger import Ledger, OutOfBudget
from composer_gradmatch.studies.verdict.source import Stored
from composer_gradmatch.studies.verdict.trial import FULL, Trial
from composer_gradmatch.train.config import ConfigError

CELLS = {
    ("random", 0.1): (-0.03, 0.15, 0.1),
    ("random", 0.3): (-0.012, 0.35, 0.1),
    ("gradmatch", 0.3): (-0.001, 0.6, 0.2),
}
PROVENANCE = {"machine": "a machine", "python": "3.11", "torch version": "2.7", "git revision": "abc"}


class Kill(BaseException):
    """As SIGKILL: nothing catches it."""


def run_of(trial):
    settings = {"strategy": trial.cell[0], "keep": trial.cell[1], "rate": trial.rate, "seed": trial.seed}
    return Run("verdict", {**settings, "share": trial.share, "data": trial.data}, {})


def on_record(store, trial):
    return store.record(run_of(trial)) is not None


class Machine:
    """Makes runs of a made-up training, and is killed now and then, before or after the run is kept."""

    def __init__(self, store, training, kills=()):
        self.store, self.training, self.kills, self.made = store, training, set(kills), 0
        self.trials = {}

    def run_of(self, trial):
        run = run_of(trial)
        self.trials[run.key] = trial
        return run

    def make(self, run):
        self.made += 1
        outcome = self.training(self.trials[run.key])
        if self.made in self.kills:
            raise Kill
        details = {"accuracies": outcome.accuracies, "training_seconds": outcome.training_seconds}
        rows = [] if outcome.error else [{"last_accuracy": outcome.last}]
        return Record(run.kind, run.settings, {}, rows, outcome.error, PROVENANCE, outcome.seconds, details)


def verdict(folder, kills=(), budget=8000.0, training=None):
    """Conducts a verdict in a folder, killed at some of its runs and started again; returns what it found."""
    training = training or MadeUp(CELLS)
    machine, starts = None, 0
    while True:
        store = Store(folder, {"study": "verdict"})
        machine = Machine(store, training, kills[starts : starts + 1])
        starts += 1
        try:
            source = Stored(store, machine.run_of, machine.make)
            found = ask(training, budget, source=source, recorded=partial(on_record, store)).as_json()
            found["recommended"]["yaml"] = "algorithms: {}\n"
            (folder / "verdict.json").write_text(json.dumps(found, indent=1))
            return found, starts
        except Kill:
            continue
        finally:
            store.close()


@pytest.mark.parametrize("budget", [8000.0, 3000.0])
def test_killed_at_random_five_times_it_comes_to_the_same(budget, tmp_path):
    whole, _ = verdict(tmp_path / "whole", budget=budget)
    kills = np.random.default_rng(0).integers(1, 15, 5).tolist()
    again, starts = verdict(tmp_path / "killed", kills, budget)
    assert starts == 6
    assert again == whole
    assert (tmp_path / "killed/verdict.json").read_bytes() == (tmp_path / "whole/verdict.json").read_bytes()


def test_a_finished_verdict_is_given_again_without_a_run(tmp_path):
    first, _ = verdict(tmp_path)
    training = MadeUp(CELLS)
    assert verdict(tmp_path, training=training)[0] == first
    assert training.made == []


def test_with_a_larger_budget_it_goes_on(tmp_path):
    small, _ = verdict(tmp_path, budget=3000.0)
    assert small["recommended"]["kind"] == "undecided"
    training = MadeUp(CELLS)
    large, _ = verdict(tmp_path, budget=20000.0, training=training)
    assert large["recommended"]["strategy"] == "gradmatch"
    fresh, _ = verdict(tmp_path / "fresh", budget=20000.0)
    assert large == fresh
    assert len(training.made) < fresh["runs"]


def test_what_is_on_record_is_taken_though_the_budget_is_gone():
    trials = [Trial(FULL, 0.1, seed) for seed in range(4)]
    ledger = Ledger(MadeUp(CELLS), 250.0, lambda cell: 1.0, 100.0, recorded=lambda trial: trial.seed < 3)
    assert len(ledger.take(trials[:3])) == 3
    assert ledger.spent == pytest.approx(300.0)
    with pytest.raises(OutOfBudget):
        ledger.take(trials)
    unpaid = Ledger(MadeUp(CELLS), 250.0, lambda cell: 1.0, 100.0)
    with pytest.raises(OutOfBudget):
        unpaid.take(trials[:3])


def test_what_was_computed_is_kept_where_the_question_cannot_be_answered(tmp_path):
    with pytest.raises(ConfigError, match="below what the test set can resolve"):
        verdict(tmp_path, training=MadeUp(CELLS, samples=600))
    store = Store(tmp_path, {"study": "verdict"})
    (record,) = store.records("verdict")
    store.close()
    assert record.settings["strategy"] == "full"


def test_a_failed_run_is_made_once_more_only_when_asked(tmp_path):
    store = Store(tmp_path, {})
    machine = Machine(store, MadeUp(CELLS, fails=[("random", 0.1)]))
    trial = next(iter(ask(MadeUp(CELLS)).ledger.taken))
    failing = type(trial)(("random", 0.1), 0.1, 0)
    for retry, made in ((False, 1), (False, 1), (True, 2)):
        outcome = Stored(store, machine.run_of, machine.make, retry)(failing)
        assert outcome.error == "ValueError: as told"
        assert machine.made == made
    store.close()


def test_the_report_says_what_was_found(tmp_path):
    found, _ = verdict(tmp_path)
    found["headroom"] |= {
        "step_times": [{"strategy": "full", "keep": 1.0, "seconds": 0.012}],
        "step_times_error": "",
        "noise_scale": [{"noise_scale": scale} for scale in (12.3, 40.0, None, 90.0)],
        "noise_scale_error": "",
        "batch_size": 128,
    }
    (tmp_path / "verdict.json").write_text(json.dumps(found))
    store = Store(tmp_path, {"study": "verdict"})
    text = write_report(store, "verdict", "made up", "python -m composer_gradmatch.studies verdict x").read_text()
    store.close()
    assert f"> {found['recommended']['sentence']}" in text
    assert "Against random at equal cost, each with its own learning rate: better: gradmatch at keep 0.3." in text
    assert "is 12, 40, none, 90 samples in the four quarters" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| gradmatch | 0.3 | 0.2 |") and "non-inf" in line)
    best = next(each for each in found["candidates"] if each["strategy"] == "gradmatch")
    assert f"{best['minus_full']['low']:+.4f}" in row
    assert "| full | 1 | 12.0 |" in text
    assert "| random | 0.1 | 0 of" in text
    for name in ("verdict.png", "time_to_accuracy.png", "verdict.pdf"):
        assert (tmp_path / name).stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "python -m composer_gradmatch.studies verdict x" in page
