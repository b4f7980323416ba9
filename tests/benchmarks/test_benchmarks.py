"""What the benchmarks measure, by allocations of known size."""

from __future__ import annotations

import csv
import itertools
import sys
import time

import numpy as np
import pytest
import torch
from composer.models import ComposerClassifier
from oracles import squared_error
from torch import nn

from composer_gradmatch import gram_omp
from composer_gradmatch.benchmarks import omp
from composer_gradmatch.benchmarks.__main__ import main
from composer_gradmatch.benchmarks.memory import _selection_peak, _StepPeak
from composer_gradmatch.benchmarks.models import MODELS, BenchmarkModel
from composer_gradmatch.benchmarks.peak import PeakMemory
from composer_gradmatch.benchmarks.problems import PROBLEMS, gram_matrices
from composer_gradmatch.benchmarks.solvers import smallest_error
from composer_gradmatch.benchmarks.timing import interleaved_medians


def test_the_peak_is_what_was_held_at_once():
    held = torch.ones(10**6)
    with PeakMemory() as memory:
        first = held + 1
        second = first * 2
        del first
        third = second - 1
        del second, third
    assert memory.bytes == pytest.approx(8e6, rel=0.01)


def test_selection_in_microbatches_takes_memory_that_does_not_grow_with_the_minibatch(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "cnn", BenchmarkModel(narrow_cnn, MODELS["resnet18_cifar"].batch, (8,), 2))
    out = tmp_path / "new" / "memory.csv"
    assert main(["memory", "--models", "cnn", "--samples", "8", "16", "--picks", "4", "--out", str(out)]) == 0
    rows = csv.DictReader(out.open())
    small, large = ({k: float(v) for k, v in row.items() if k != "model"} for row in rows)
    assert large["selection, one pass (MiB)"] > 1.8 * small["selection, one pass (MiB)"]
    assert large["selection, microbatches (MiB)"] < 1.05 * small["selection, microbatches (MiB)"]
    assert large["training step (MiB)"] == pytest.approx(small["training step (MiB)"], rel=0.05)
    assert "cnn" in capsys.readouterr().out


def test_with_a_large_vocabulary_selection_takes_less_memory_than_the_step_on_its_picks():
    step = _StepPeak()
    assert 0 < _selection_peak("causal_lm", 16, 4, 4, step) < step.peak


def narrow_cnn():
    """Of many activations and few weights."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return ComposerClassifier(nn.Sequential(*layers), num_classes=10)


def test_each_keep_has_a_row_beside_the_full_batch(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "cnn", BenchmarkModel(narrow_cnn, MODELS["resnet18_cifar"].batch, (8,), 2))
    out = tmp_path / "memory.csv"
    assert main(["memory", "--models", "cnn", "--samples", "8", "16", "--keep", "0.05", "0.5", "--out", str(out)]) == 0
    rows = [{name: float(value) for name, value in row.items() if name != "model"} for row in read(out)]
    assert [(row["M"], row["keep"], row["m"]) for row in rows] == [
        (8, 0.05, 1),
        (8, 0.5, 4),
        (16, 0.05, 1),
        (16, 0.5, 8),
    ]
    for row in rows:
        two_passes, one_pass = row["training step (MiB)"], row["step of one pass (MiB)"]
        full = row["full batch's step (MiB)"]
        assert two_passes == pytest.approx(full / 2, rel=0.1) if row["keep"] == 0.5 else two_passes < full / 2
        # What the forward pass saves of all samples, and again of the picks.
        assert full / 2 < one_pass < (1 + row["m"] / row["M"]) * full
    small, large = rows[1], rows[3]
    assert large["full batch's step (MiB)"] == pytest.approx(2 * small["full batch's step (MiB)"], rel=0.1)


def test_minilm_classifies_texts_of_64_tokens():
    model, batch = MODELS["minilm"].build(), MODELS["minilm"].batch(2)
    assert {name: tuple(values.shape) for name, values in batch.items()} == {
        "input_ids": (2, 64),
        "attention_mask": (2, 64),
        "labels": (2,),
    }
    outputs = model(batch)
    assert outputs["logits"].shape == (2, 2)
    assert model.loss(outputs, batch).isfinite()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22.7e6, rel=0.01)


def test_minilm_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"minilm needs transformers: pip install 'composer-gradmatch\[nlp\]'"):
        MODELS["minilm"].build()


def read(path):
    return list(csv.DictReader(path.open()))


def test_medians_are_those_of_each_contestant_and_leave_out_its_first_call_in_a_turn():
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.2 if len(calls) % 4 == 1 else 0.02)

    medians = interleaved_medians({"slow": slow, "fast": lambda: calls.append("fast")}, rounds=2, calls=1)
    assert calls == ["slow", "slow", "fast", "fast"] * 2
    assert 0.02 <= medians["slow"] < 0.1
    assert medians["fast"] < 0.01


def test_omp_is_timed_beside_its_peers(tmp_path, capsys):
    out = tmp_path / "omp.csv"
    assert main(["omp", "--sizes", "32,8", "16,16", "--rounds", "1", "--out", str(out)]) == 0
    rows = [row for row in read(out) if row["device"] == "cpu"]
    assert {(row["M"], row["m"]) for row in rows} == {("32", "8"), ("16", "16")}
    assert {"gram_omp", "plain numpy", "scikit-learn"} <= {row["solver"] for row in rows}
    for row in rows:
        assert float(row["time (ms)"]) > 0
        (ours,) = [r for r in rows if r["solver"] == "gram_omp" and r["M"] == row["M"]]
        assert float(row["ratio to ours"]) == pytest.approx(float(row["time (ms)"]) / float(ours["time (ms)"]))
    assert "scikit-learn" in capsys.readouterr().out


def test_a_contestant_that_picks_other_samples_is_told(monkeypatch):
    monkeypatch.setattr(omp, "_scikit_learn", lambda gram, target, k: lambda: np.arange(k))
    with pytest.raises(RuntimeError, match="scikit-learn picks other samples"):
        omp.measure_omp([(32, 4)], rounds=1, devices=["cpu"])


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_gram_matrices_of_distinct_minibatches(name):
    grams = list(gram_matrices(name, 12, 3))
    assert all(gram.shape == (12, 12) and torch.linalg.eigvalsh(gram).min() > -1e-9 for gram in grams)
    assert not torch.allclose(grams[0], grams[1])
    assert all(torch.equal(a, b) for a, b in zip(grams, gram_matrices(name, 12, 3), strict=True))


def test_the_exact_optimum_is_that_of_least_squares_on_every_subset():
    gradients = np.random.default_rng(0).standard_normal((8, 30))
    mean = gradients.mean(0)
    for m in (1, 3, 8):
        best = min(squared_error(gradients, mean, subset) for subset in itertools.combinations(range(8), m))
        found = smallest_error(torch.from_numpy(gradients @ gradients.T), m)
        assert found == pytest.approx(best / (mean @ mean), abs=1e-12)


def test_greedy_is_compared_with_the_exact_optimum(tmp_path):
    out = tmp_path / "greedy.csv"
    assert main(["greedy", "--samples", "8", "--minibatches", "3", "--out", str(out)]) == 0
    rows = read(out)
    assert {row["problem"] for row in rows} == set(PROBLEMS)
    assert {row["solver"] for row in rows} == {"omp", "sklearn", "nonnegative", "swap"}
    assert all(1 - 1e-9 <= float(row["mean ratio"]) <= float(row["worst ratio"]) for row in rows)
    assert any(float(row["worst ratio"]) > 1.001 for row in rows)


def test_solvers_report_error_and_time(tmp_path):
    out = tmp_path / "solvers.csv"
    assert main(["solvers", "--samples", "20", "--minibatches", "2", "--out", str(out)]) == 0
    rows = read(out)
    by = {(row["problem"], row["m"], row["solver"]): row for row in rows}
    grams = list(gram_matrices("random", 20, 2))
    for m in (2, 6, 10):
        errors = []
        for gram in grams:
            picks, weights = gram_omp(gram, gram.mean(1), m)
            u = torch.zeros(20, dtype=torch.float64).index_put((picks,), weights) - 1 / 20
            errors.append((u @ gram @ u / gram.mean()).item())
        assert float(by["random", str(m), "omp"]["error"]) == pytest.approx(np.mean(errors), rel=1e-6)
        assert float(by["random", str(m), "swap"]["error"]) <= float(by["random", str(m), "omp"]["error"]) * (1 + 1e-9)
        assert float(by["random", str(m), "nonnegative"]["negative weights"]) == 0
    assert all(float(row["time (ms)"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["omp", "--sizes", "8,9"], "expected m of at most M"),
        (["omp", "--sizes", "8"], "expected a positive integer, got ''"),
        (["greedy", "--samples", "17"], "expected 2 to 16"),
        (["solvers", "--minibatches", "0"], "expected a positive integer"),
    ],
)
def test_wrong_arguments_of_the_other_benchmarks_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picks", "0"], "expected a positive integer, got '0'"),
        (["--samples", "16", "--picks", "16"], "fewer than the smallest minibatch of resnet18_cifar, 16; got 16"),
        (["--models", "minilm", "--samples", "8"], "expected fewer than the smallest minibatch of minilm, 8; got 8"),
        (["--models", "gpt5"], "invalid choice: 'gpt5'"),
        (["--keep", "1"], "argument --keep: expected a fraction between 0 and 1, exclusive; got '1'"),
        (["--keep", "0.5", "0"], "expected a fraction between 0 and 1, exclusive; got '0'"),
        (["--keep", "nan"], "expected a fraction between 0 and 1, exclusive; got 'nan'"),
        (["--keep", "half"], "expected a fraction between 0 and 1, exclusive; got 'half'"),
        (["--keep", "0.5", "--picks", "4"], "argument --picks: not allowed with argument --keep"),
        (["--keep", "0.5", "--samples", "1"], "--samples: expected at least 2"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["memory", *arguments])
    assert message in capsys.readouterr().err
