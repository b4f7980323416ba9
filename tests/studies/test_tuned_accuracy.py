"""The accuracy study with learning rates of each strategy's own, and its times to accuracy, on made-up results."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest
from made_up_results import PROVENANCE, costs, line

from composer_gradmatch.studies.accuracy.plan import plan_accuracy
from composer_gradmatch.studies.report import write_report
from composer_gradmatch.studies.store import Record, Run
from composer_gradmatch.train.config import ConfigError, load_config

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
BEST = {"full": 0.05, "random": 0.1}


class MadeUpEngine:
    """Makes runs that are the better, the nearer their rate is to the strategy's best."""

    slots = 1

    def __init__(self):
        self.runs = []

    def prepare(self, at_once):
        assert at_once == 1

    def do(self, task, run, logs):
        self.runs.append(run)
        accuracy = 0.9 - 0.1 * abs(log(run.config["optimizer"]["lr"] / BEST[run.settings["strategy"]]))
        details = {"accuracies": [accuracy], "training_seconds": [2.0]}
        return Record(run.kind, run.settings, run.config, [{"last_accuracy": accuracy}], "", PROVENANCE, 3.0, details)

    def close(self):
        pass


def test_each_strategy_is_trained_at_the_rate_that_the_validation_part_chose(store):
    engine = MadeUpEngine()
    plan = plan_accuracy(load_config(DIGITS), ["random", "full"], [0.3], seeds=2, tune=True, validation=0.2)
    assert plan.shared["tuned on"] == 0.2
    assert plan.adapt is not None
    runs = plan.adapt(store, engine, False)
    assert [(run.settings["strategy"], run.settings["rate"], run.config["optimizer"]["lr"]) for run in runs] == [
        ("random", 0.1, 0.1),
        ("full", 0.05, 0.05),
    ] * 2
    assert all("validation" not in run.config["train_loader"] for run in runs)
    assert {run.kind for run in engine.runs} == {"tuning"}
    assert all(run.config["train_loader"]["validation"]["fraction"] == 0.2 for run in engine.runs)
    efforts = [sum(run.settings["strategy"] == name for run in engine.runs) for name in BEST]
    assert efforts[0] == efforts[1] == 12
    made = len(engine.runs)
    assert [run.settings for run in plan.adapt(store, engine, False)] == [run.settings for run in runs]
    assert len(engine.runs) == made

    add_curves(store, {("random", 0.3): [([0.5, 0.9], [1.0, 2.0])], ("full", 1.0): [([0.6, 0.91], [4.0, 8.0])]}, BEST)
    costs(store, full={1.0: 1.0}, random={0.3: 0.3})
    text = write_report(store, "accuracy", "made up").read_text()
    assert line(text, "| random | 0.3 | 0.1 | 12 | 36 s |")
    assert line(text, "| full | 1 | 0.05 | 12 | 36 s |")


def add_curves(store, curves, rates=None):
    for (strategy, keep), runs in curves.items():
        for seed, (accuracies, seconds) in enumerate(runs):
            settings = {"strategy": strategy, "keep": keep, "seed": seed, "label_noise": 0.0, "batch_size": "fixed"}
            settings |= {"rate": rates[strategy]} if rates else {}
            row = {"best_accuracy": max(accuracies), "last_accuracy": accuracies[-1]}
            details = {"accuracies": accuracies, "training_seconds": seconds}
            run = Run("accuracy", settings, {})
            store.save(run, Record(run.kind, settings, {}, [row], "", PROVENANCE, 1.0, details))


def test_times_to_accuracy_are_shares_of_the_full_batchs_run_of_the_same_seed(store):
    curves = {
        ("full", 1.0): [([0.5, 0.9], [5.0, 10.0]), ([0.6, 0.9], [10.0, 20.0])],
        ("random", 0.1): [([0.897, 0.8], [1.0, 2.0]), ([0.8, 0.899], [1.0, 3.0])],
        ("loss", 0.1): [([0.2, 0.3], [1.0, 2.0]), ([0.2, 0.3], [1.0, 2.0])],
    }
    add_curves(store, curves)
    text = write_report(store, "accuracy", "made up").read_text()
    times = text[text.index("## Time to accuracy") :]
    assert "reaches 0.8950" in times
    assert line(times, "| random | 0.1 |") == "| random | 0.1 | 2 of 2 | 0.12 (0.10 to 0.15) |"
    assert line(times, "| loss | 0.1 |") == "| loss | 0.1 | 0 of 2 | reached by 0 of 2 runs |"
    assert line(times, "| full | 1 |") == "| full | 1 | 2 of 2 | 1.00 (1.00 to 1.00) |"
    assert (store.folder / "time_to_accuracy.png").stat().st_size > 10_000
    assert "data:image/png;base64," in (store.folder / "report.html").read_text()


def test_a_rate_of_zero_cannot_be_tuned():
    config = load_config(DIGITS, ["optimizer.lr=0"])
    with pytest.raises(ConfigError, match=r"optimizer.lr: expected a number above 0"):
        plan_accuracy(config, ["full"], [0.3], seeds=1, tune=True)
