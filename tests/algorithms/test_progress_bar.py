"""What Composer's progress bar shows of selection, beside the loss."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cases import MLP, ON, loader
from composer import Trainer
from composer.loggers import InMemoryLogger, ProgressBarLogger
from on_device import OnDevice
from torch.optim import SGD

from composer_gradmatch import GradMatch, RandomBackprop, Rule, RuleBackprop, WholeBatch, select_first
from composer_gradmatch.train import train
from composer_gradmatch.train.config import load_config

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"


def shown(text):
    """What a bar shows of each step, from 1; it counts a step only once it has shown the step's loss."""
    of_steps = {}
    for line in re.split(r"[\r\n]+", text):
        if found := re.search(r"(\d+)/\d+ \[.*?(?:/s|s/ba), (.*)\]", line):
            of_steps[int(found[1]) + 1] = dict(each.split("=") for each in found[2].split(", "))
    return of_steps


def run(algorithm, folder, **kwargs):
    """Trains for six steps; returns what the bar has shown, and the logged metrics."""
    model, logger = MLP.model(), InMemoryLogger()
    with open(folder / "bar.txt", "w+") as stream:
        Trainer(
            model=model,
            train_dataloader=loader(MLP.data(60), 20),
            algorithms=[algorithm],
            algorithm_passes=[select_first],
            optimizers=SGD(model.parameters(), lr=0.1),
            loggers=[logger],
            console_stream=stream,
            **{"max_duration": "6ba", "progress_bar": True, "seed": 0, **kwargs},
        ).fit()
        stream.seek(0)
        text = stream.read()
    return shown(text), {name: [f"{value:.2f}" for _, value in values] for name, values in logger.data.items()}


@pytest.mark.parametrize("algorithm_class", [GradMatch, OnDevice])
def test_keep_and_step_length_of_each_step_stand_behind_the_loss(algorithm_class, tmp_path):
    bar, metrics = run(algorithm_class(**ON, keep=0.3), tmp_path)
    assert [bar[i]["keep"] for i in range(1, 7)] == ["0.30"] * 6
    assert [bar[i]["step_length"] for i in range(1, 7)] == metrics["gradmatch/step_length"]
    assert len(set(metrics["gradmatch/step_length"])) > 1
    assert list(bar[6]) == ["loss/train/total", "keep", "step_length"]


def test_steps_that_are_trained_whole_between_others_and_after_them_are_told(tmp_path):
    algorithm = GradMatch(start=0.0, end=0.6, interrupt=2, keep=0.3)
    bar, metrics = run(algorithm, tmp_path)
    assert [bar[i]["keep"] for i in range(1, 7)] == ["0.30", "1.00", "0.30", "0.30", "1.00", "1.00"]
    lengths = metrics["gradmatch/step_length"]
    assert [bar[i]["step_length"] for i in range(1, 7)] == [lengths[0], "1.00", *lengths[1:], "1.00", "1.00"]


def test_minibatches_that_cannot_be_selected_from_are_told_as_trained_whole(tmp_path):
    def fourth(candidates, m):
        calls.append(m)
        # The first call is the rehearsal.
        return WholeBatch() if len(calls) == 5 else (range(m), None)

    calls = []
    bar, _ = run(RuleBackprop(Rule(fourth, needs="losses", weighs=False), **ON, keep=0.3), tmp_path)
    assert [bar[i]["keep"] for i in range(1, 7)] == ["0.30"] * 3 + ["1.00"] + ["0.30"] * 2


def test_what_looks_at_nothing_shows_no_step_length_and_nothing_is_shown_before_selection(tmp_path):
    bar, _ = run(RandomBackprop(start=0.5, end=1.0, interrupt=0, keep=0.3), tmp_path)
    assert ["keep" in bar[i] for i in range(1, 7)] == [False] * 3 + [True] * 3
    assert not any("step_length" in each for each in bar.values())


def test_each_epoch_has_a_bar_of_its_own_and_a_resumed_run_goes_on(tmp_path):
    arguments = {"save_folder": str(tmp_path), "run_name": "bar", "save_interval": "1ba"}
    run(GradMatch(**ON, keep=0.3), tmp_path, max_duration="4ba", **arguments)
    bar, metrics = run(
        GradMatch(**ON, keep=0.3), tmp_path, load_path=str(tmp_path / "ep1-ba4-rank0.pt"), max_duration="3ep"
    )
    assert [bar[i]["step_length"] for i in range(1, 4)] == metrics["gradmatch/step_length"][-3:]


def test_without_a_bar_or_with_one_that_is_made_otherwise_a_run_is_as_it_was(tmp_path, monkeypatch):
    algorithm = GradMatch(**ON, keep=0.3)
    assert run(algorithm, tmp_path, progress_bar=False)[0] == {}
    assert not algorithm._steps.shows_picks
    build = ProgressBarLogger._build_pbar

    def without_metrics(self, state, is_train):
        bar = build(self, state, is_train)
        bar.log_data = lambda data: None
        del bar.metrics
        return bar

    monkeypatch.setattr(ProgressBarLogger, "_build_pbar", without_metrics)
    run(algorithm, tmp_path)


def test_from_yaml(tmp_path, capfd):
    overrides = ["max_duration=3ba", "progress_bar=true", f"save_folder={tmp_path}/run", "eval_loader=null"]
    train(load_config(DIGITS, overrides))
    bar = shown(capfd.readouterr().err)
    assert bar[3]["keep"] == "0.30"
    assert float(bar[3]["step_length"]) > 0
