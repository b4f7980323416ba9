"""What the benchmarks of stored looks compare, by candidates whose differences are known."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from composer_gradmatch import Candidates
from composer_gradmatch.benchmarks.__main__ import main
from composer_gradmatch.benchmarks.looks import compare_picks
from composer_gradmatch.benchmarks.store import through_a_store

DIGITS = str(Path(__file__).resolve().parents[2] / "configs" / "digits.yaml")


def candidates(inputs, grads):
    return Candidates(len(inputs), losses=torch.ones(len(inputs)), inputs=inputs, output_grads=grads)


@pytest.fixture
def seen():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 64, generator=generator)
    return inputs, torch.randn(40, 5, generator=generator) + 0.5


def test_the_same_candidates_give_the_same_picks(seen):
    compared = compare_picks(candidates(*seen), candidates(*seen), 6)
    assert (compared["overlap"], compared["error in K"]) == (1.0, 0.0)
    assert compared["r"] == compared["r of a full look"]


def test_errors_are_those_of_explicit_gradients(seen):
    inputs, grads = seen
    other = inputs.flip(0)
    compared = compare_picks(candidates(other, grads), candidates(inputs, grads), 6)
    assert 0 <= compared["overlap"] < 1
    h, p = inputs.double(), grads.double()
    explicit = torch.cat([torch.einsum("mc,md->mcd", p, h).flatten(1), p], 1)
    centred = explicit - explicit.mean(0)
    of_random = centred.square().sum() / 39 * (1 / 6 - 1 / 40)
    # Matching pursuit, step by step, on explicit gradients.
    for name, own in (("r of a full look", explicit), ("r", None)):
        if own is None:
            h = other.double()
            own = torch.cat([torch.einsum("mc,md->mcd", p, h).flatten(1), p], 1)
        picks, residual = [], own.mean(0)
        for _ in range(6):
            scores = own @ residual
            scores[picks] = -torch.inf
            picks.append(int(scores.argmax()))
            weights = torch.linalg.lstsq(own[picks].T, own.mean(0)[:, None]).solution[:, 0]
            residual = own.mean(0) - weights @ own[picks]
        error = (weights.clip(0) @ explicit[picks] - explicit.mean(0)).square().sum()
        assert compared[name] == pytest.approx(float(error / of_random), rel=1e-4)


def test_a_store_keeps_what_it_says(seen):
    inputs, grads = seen
    whole, size = through_a_store(candidates(inputs, grads), 64)
    torch.testing.assert_close(whole.inputs, inputs.half().float(), rtol=0, atol=0)
    assert size == 2 * 64 + 16
    short, size = through_a_store(candidates(inputs, grads), 16)
    assert short.inputs.shape == (40, 16)
    assert size == 2 * 16 + 4 * 5 + 16
    # Products of projected rows are off by about 1/sqrt(width) of the product of their norms.
    norms = inputs.norm(dim=1)
    error = (short.inputs @ short.inputs.T - inputs @ inputs.T) / torch.outer(norms, norms)
    assert float(error.square().mean().sqrt()) == pytest.approx(1 / 16**0.5, rel=0.3)


def test_the_commands(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    short = [DIGITS, "max_duration=2ep", "seed=0"]
    assert main(["store", *short, "--width", "8", "--out", str(out)]) == 0
    small, large = ({name: float(value) for name, value in row.items()} for row in csv.DictReader(out.open()))
    assert (small["bytes a sample"], large["bytes a sample"]) == (8 * 2 + 10 * 4 + 16, 64 * 2 + 16)
    assert small["error in K"] > 100 * large["error in K"]
    assert main(["looks", *short, "--refresh", "1ep", "never", "--fill", "running", "--out", str(out)]) == 0
    always, never = csv.DictReader(out.open())
    # With one epoch each sample is due, and a look is one at the whole minibatch.
    assert (float(always["looked at"]), float(always["overlap"]), float(always["error in K"])) == (1, 1, 0)
    assert float(never["looked at"]) < 0.2
    assert float(never["overlap"]) < 1
    with pytest.raises(SystemExit):
        main(["looks", *short, "--refresh", "soon"])
    assert "expected a time such as 5ep, or never" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["looks", "nowhere.yaml"])
    assert "nowhere.yaml" in capsys.readouterr().err
