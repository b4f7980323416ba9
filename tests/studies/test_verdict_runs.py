"""The verdict's parts that train: configs of trials, the noise scale, and the whole of it on real digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import WholeBatch
from composer_gradmatch.studies.__main__ import main
from composer_gradmatch.studies.building import ByNames
from composer_gradmatch.studies.options import duration
from composer_gradmatch.studies.verdict.noise_scale import NoiseScale, noise_scale, parts_of_gram
from composer_gradmatch.studies.verdict.plan import plan_verdict
from composer_gradmatch.studies.verdict.progress import in_words
from composer_gradmatch.studies.verdict.runs import batches_of, runs_of
from composer_gradmatch.studies.verdict.trial import FULL, Trial
from composer_gradmatch.train import check_config
from composer_gradmatch.train.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DIGITS = str(CONFIGS / "digits.yaml")
METRIC = "metrics/eval/MulticlassAccuracy"


def test_the_parts_of_the_gram_matrix_are_without_bias():
    generator = torch.Generator().manual_seed(0)
    mean, scale = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5])
    found = []
    for _ in range(4000):
        gradients = mean + scale * torch.randn(6, 3, generator=generator, dtype=torch.float64)
        gram = gradients @ gradients.T
        squared_norm, trace = parts_of_gram(gram)
        # The same by the sample covariance and the mean, in explicit gradients.
        explicit = gradients.var(0).sum()
        assert trace == pytest.approx(float(explicit))
        assert squared_norm == pytest.approx(float(gradients.mean(0).square().sum() - explicit / 6))
        found.append((squared_norm, trace))
    norms, traces = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    assert norms == pytest.approx(float(mean.square().sum()), rel=0.05)
    assert traces == pytest.approx(float(scale.square().sum()), rel=0.03)


def test_the_noise_scale_trains_whole_batches():
    found = []
    rule = NoiseScale(found=found)
    assert rule(Candidates(2, gram=torch.tensor([[2.0, 1.0], [1.0, 3.0]])), 1) == WholeBatch()
    assert rule(Candidates(1, gram=torch.tensor([[2.0]])), 1) == WholeBatch()
    assert found == [(1.0, 1.5)]


@pytest.mark.parametrize("changes", [[], ["scheduler=null"], ["max_duration=3ep"], ["max_duration=300ba"]])
def test_each_trial_is_a_config_that_can_be_run(changes):
    config = load_config(DIGITS, changes)
    run_of = runs_of(config, "verdict", METRIC, 0.1, 0.1, 7)
    batches = batches_of(config)
    for share in (0.25, 0.5, 1.0):
        run = run_of(Trial(("gradmatch", 0.3), 0.02, 3, share, "validation"))
        check_config(run.config)
        assert run.config["seed"] == 3
        assert run.config["optimizer"]["lr"] == 0.02
        assert run.config["train_loader"]["label_noise"] == {"fraction": 0.1, "seed": 3}
        split = {"fraction": 0.1, "seed": 7}
        assert run.config["train_loader"]["validation"] == {**split, "part": "train"}
        assert run.config["eval_loader"]["validation"] == {**split, "part": "validation"}
        assert run.config["eval_loader"]["dataset"]["split"] == "train"
        assert not run.config["eval_loader"].get("shuffle")
        # Of 11 batches an epoch, the part that is trained on has 10.
        whole = batches if config["max_duration"].endswith("ba") else batches * 10 / 11
        assert batches_of(run.config) == int(share * whole)
    test = run_of(Trial(FULL, 0.02, 3))
    assert test.config["eval_loader"] == config["eval_loader"]
    assert "validation" not in test.config["train_loader"]
    assert test.config["max_duration"] == config["max_duration"]


def test_the_full_batch_and_random_are_candidates_in_any_case():
    plan = plan_verdict(load_config(DIGITS), ["gradmatch"], [0.3], budget=60.0)
    assert [run.settings["strategy"] for run in plan.runs] == ["full", "random", "gradmatch", "full"]
    assert "budget" not in plan.shared
    assert plan.adapt is not None


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("300s", 300), ("1.5h", 5400), ("2H", 7200)]
)
def test_budgets_are_times(text, seconds):
    assert duration(text) == seconds


def test_times_in_words():
    assert [in_words(seconds) for seconds in (5.4, 59.6, 200, 3900)] == ["5s", "1m00s", "3m20s", "1h05m"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--budget", "soon"], "a time such as 2h, 90m, 1h30m or 300s, got 'soon'"),
        (["--budget", "2"], "a time such as 2h"),
        (["--budget", "0s"], "a time such as 2h"),
        ([], "--budget"),
        (["--budget", "1h", "--confidence", "95"], "a fraction in (0, 1), got '95'"),
        (["--budget", "1h", "--margin", "0"], "a positive number, got '0'"),
    ],
)
def test_wrong_options_are_refused(options, expected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["verdict", DIGITS, "--out", str(tmp_path), *options])
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["eval_loader=null"], "eval_loader: missing; the study compares test accuracy"),
        (["--margin", "0.001"], "--margin 0.001 is below what the test set can resolve: one of its 360 samples"),
        (["optimizer.lr=0"], "optimizer.lr: expected a number above 0"),
        (["--validation", "0.0001"], "leaves 0 to validate on"),
    ],
)
def test_what_cannot_be_run_is_told_before_any_work(options, expected, tmp_path, capsys):
    assert main(["verdict", DIGITS, "--out", str(tmp_path / "out"), "--budget", "1h", *options]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


def test_the_noise_scale_of_a_run_on_digits():
    config = load_config(DIGITS, ["max_duration=1ep", "save_folder=null", "loggers=null", "eval_loader=null"])
    run = runs_of({**config, "eval_loader": None}, "noise-scale", METRIC, 0.0, 0.1, 0)(Trial(FULL, 0.05, 0))
    rows, details = noise_scale(type(run)(run.kind, run.settings, run.config, {"config": config}))
    assert details == {"minibatches": 11}
    assert [row["quarter"] for row in rows] == [1, 2, 3, 4]
    assert all(row["trace"] > 0 for row in rows)
    assert all(row["noise_scale"] is None or row["noise_scale"] > 0 for row in rows)


def test_a_verdict_on_digits_keeps_its_budget_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ByNames, "here", True)  # A worker takes longer to start than all runs take.
    out = tmp_path / "out"
    command = ["verdict", DIGITS, "max_duration=1ep", "--out", str(out), "--strategies", "full", "--keep", "0.1"]
    command += ["--margin", "0.1", "--budget", "12s"]
    assert main(command) == 0
    found = json.loads((out / "verdict.json").read_text())
    assert found["spent_s"] <= 1.1 * 12
    assert found["recommended"]["sentence"] in capsys.readouterr().out
    assert found["recommended"]["yaml"].startswith("optimizer: {")
    assert [(each["strategy"], each["keep"]) for each in found["candidates"]] == [("random", 0.1)]
    assert found["headroom"]["step_times"]
    kept = {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")}
    assert len(kept) >= found["runs"]
    assert main(command) == 0
    assert json.loads((out / "verdict.json").read_text()) == found
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")} == kept
    assert (out / "report.html").stat().st_size > 20_000
