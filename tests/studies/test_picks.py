"""Who was picked: sums over epochs, scores against brute force, and the report of a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch.utils.data import TensorDataset

from composer_gradmatch.data import DATA_SETS, NoisyLabels, digits
from composer_gradmatch.studies.__main__ import main
from composer_gradmatch.studies.picks import figures
from composer_gradmatch.studies.picks.samples import SCORES, find_wrong, per_sample
from composer_gradmatch.train import train
from composer_gradmatch.train.config import load_config

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
LOG = pd.DataFrame(
    {
        "epoch": [1] * 4 + [2] * 4,
        "sample": [0, 1, 2, 3] * 2,
        "visits": [1, 1, 1, 0, 2, 1, 1, 0],
        "picked": [1, 0, 1, 0, 1, 0, 1, 0],
        "mean_weight": [2.0, np.nan, 1.0, np.nan, 3.0, np.nan, 0.5, np.nan],
        "loss": [1.0, 4.0, np.nan, np.nan, 2.0, 6.0, 3.5, np.nan],
        "gradient_norm": [np.nan] * 8,
    }
)


def test_a_row_for_each_sample_sums_its_epochs_up():
    table = per_sample(LOG)
    assert table["visits"].tolist() == [3, 2, 2, 0]
    assert table["picked"].tolist() == [2, 0, 2, 0]
    np.testing.assert_array_equal(table["share"], [2 / 3, 0, 1, np.nan])
    np.testing.assert_array_equal(table["mean_weight"], [2.5, np.nan, 0.75, np.nan])
    np.testing.assert_array_equal(table["loss"], [1.5, 5.0, 3.5, np.nan])
    assert table["gradient_norm"].isna().all()
    np.testing.assert_allclose(table["loss_score"], [1 / 3, 1, 2 / 3, np.nan])
    np.testing.assert_allclose(table["rarely_score"], [2 / 3, 1, 1 / 3, np.nan])
    np.testing.assert_allclose(table["both_score"], [0.5, 1, 0.5, np.nan])


@pytest.mark.parametrize("seed", range(4))
def test_a_score_is_judged_by_all_pairs_and_by_those_at_the_top(seed):
    rng = np.random.default_rng(seed)
    scores, wrong = rng.integers(1, 6, 30).astype(float), rng.random(30) < 0.3
    scores[0] = np.nan  # Comes last.
    known = np.nan_to_num(scores)
    pairs = [(a > b) + 0.5 * (a == b) for a in known[wrong] for b in known[~wrong]]
    found = find_wrong(pd.Series(scores), wrong)
    assert found.area == pytest.approx(np.mean(pairs))
    number, shares = int(wrong.sum()), []
    for _ in range(3000):  # Of equal scores, who is among the first is drawn.
        order = np.lexsort((rng.random(30), -known))
        shares.append(wrong[order[:number]].mean())
    assert found.precision == pytest.approx(np.mean(shares), abs=5 * np.std(shares) / 3000**0.5 + 1e-12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two short epochs, the second of which is selected from."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [
        "run_name=picked",
        f"save_folder={folder}/{{run_name}}",
        "max_duration=2ep",
        "progress_bar=false",
        "algorithms.gradmatch={start: 0.5, keep: 0.3, interrupt: 0, end: 1.0, refresh: 1ep}",
        "callbacks.selection_log={}",
        "train_loader.label_noise={fraction: 0.2, seed: 3}",
        "eval_loader=false",
    ]
    train(load_config(DIGITS, overrides))
    return folder / "picked"


def test_a_runs_report(run, tmp_path, capsys, monkeypatch):
    drawn = {}
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (drawn.setdefault(path.name, figure), save(figure, path)))
    assert main(["picks", str(run), "--out", str(tmp_path / "out"), "--samples", "5"]) == 0
    printed = capsys.readouterr().out
    files = {"most_picked", "least_picked", "classes", "wrong_labels"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"{name}{suffix}" for name in files for suffix in (".png", ".pdf")),
        "samples.csv",
        "summary.md",
    }
    assert (tmp_path / "out" / "summary.md").read_text() in printed
    assert "picked: gradmatch, keep 0.3; epochs 1 to 2; 1,437 samples." in printed
    samples: Any = pd.read_csv(tmp_path / "out" / "samples.csv", index_col="sample")
    log: Any = pd.read_parquet(run / "selection_log")
    picked = log.groupby("sample")["picked"].sum()
    assert (samples["picked"] == picked[samples.index]).all()
    assert picked.sum() == 11 * 128 + 11 * 38  # All of the first epoch's minibatches, m of each of the second's.
    assert (samples["loss"].dropna().diff().dropna() <= 0).all()
    noisy = NoisyLabels(digits("train"), 0.2, 3)
    assert (samples["label"] == noisy.noisy_labels[samples.index]).all()
    wrong = (samples["label"] != samples["true_label"]).sort_index()
    assert wrong[wrong].index.tolist() == noisy.wrong_indices.tolist()
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1] for line in printed.splitlines() if " | " in line}
    for column, label in SCORES.items():
        area = find_wrong(samples[column].sort_index(), wrong.to_numpy()).area
        assert rows[label] == f"{area:.3f}"
    titles = [axes.get_title().split("\n") for axes in drawn["most_picked"].axes if axes.get_title()]
    assert len(titles) == 5
    assert all(counts in ("1/1", "2/2") for _, counts in titles), "who was always picked comes first"
    assert len(drawn["classes"].axes[1].patches) == 10


def folder_of(tmp_path, log=LOG, **config):
    """A run's folder, made by hand."""
    folder = tmp_path / "run"
    (folder / "selection_log").mkdir(parents=True)
    made = {
        "run_name": "by hand",
        "train_loader": {"name": "mine"},
        "algorithms": {"ema": False, "swa": None},
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    if log is not None:
        for epoch, part in log.groupby("epoch"):
            part.to_parquet(folder / "selection_log" / f"ep{epoch}.parquet")
    return folder


class Texts:
    labels = torch.tensor([0, 1, 1, 0])
    classes = ("bad", "good")

    def __len__(self):
        return 4

    def texts(self, numbers):
        return [f"text {number} costs $1 and $2 " + "on and on " * 50 for number in numbers]


def test_texts_are_drawn_by_their_beginnings(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATA_SETS, "mine", Texts)
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.setdefault(path.name, figure))
    assert main(["picks", str(folder_of(tmp_path))]) == 0
    said = [text.get_text() for text in drawn["least_picked"].axes[0].texts]
    assert said[0] == "good  0/2"
    assert said[1].startswith(r"text 1 costs \$1")
    assert len(said) == 6, "a sample that was in no minibatch is none that was not picked"
    assert "| good | 2 | 0.50 | 1 |" in capsys.readouterr().out
    assert not drawn.keys() & {"wrong_labels"}


def test_what_has_no_classes_and_no_pictures_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATA_SETS, "mine", lambda: TensorDataset(torch.zeros(4, 2), torch.zeros(4)))
    assert main(["picks", str(folder_of(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert "neither images nor texts" in printed
    assert "no classes" in printed
    assert sorted(path.name for path in (tmp_path / "run" / "picks").iterdir()) == ["samples.csv", "summary.md"]


@pytest.mark.parametrize(
    ("log", "config", "message"),
    [
        (None, {}, "there is no selection_log: train with callbacks.selection_log"),
        (LOG[LOG["sample"] < 3], {}, "the log has 3 samples, but mine has 4"),
        (LOG.assign(picked=0), {}, "no sample was picked"),
        (LOG, {"train_loader": {"name": "mnist"}}, "unknown data set 'mnist'"),
        (LOG, {"train_loader": {"name": "mine", "label_noise": {"fraction": 2, "seed": 0}}}, r"fraction must be in"),
    ],
)
def test_what_cannot_be_shown_is_told(log, config, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATA_SETS, "mine", Texts)
    assert main(["picks", str(folder_of(tmp_path, log, **config))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "picks").exists()


def test_a_folder_that_is_no_runs_is_told(tmp_path, capsys):
    assert main(["picks", str(tmp_path)]) == 2
    assert "there is no config.yaml: expected the folder of a run" in capsys.readouterr().err
