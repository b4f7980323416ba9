"""What the benchmarks measure, by allocations of known size."""

from __future__ import annotations

import csv

import pytest
import torch

from composer_gradmatch.benchmarks.__main__ import main
from composer_gradmatch.benchmarks.peak import PeakMemory


def test_the_peak_is_what_was_held_at_once():
    held = torch.ones(10**6)
    with PeakMemory() as memory:
        first = held + 1
        second = first * 2
        del first
        third = second - 1
        del second, third
    assert memory.bytes == pytest.approx(8e6, rel=0.01)


def test_selection_in_microbatches_takes_memory_that_does_not_grow_with_the_minibatch(tmp_path, capsys):
    out = tmp_path / "new" / "memory.csv"
    assert (
        main(["memory", "--models", "resnet18_cifar", "--samples", "8", "16", "--picks", "4", "--out", str(out)]) == 0
    )
    rows = csv.DictReader(out.open())
    small, large = ({k: float(v) for k, v in row.items() if k != "model"} for row in rows)
    assert large["selection, one pass (MiB)"] > 1.8 * small["selection, one pass (MiB)"]
    assert large["selection, microbatches (MiB)"] < 1.05 * small["selection, microbatches (MiB)"]
    assert large["training step (MiB)"] == pytest.approx(small["training step (MiB)"], rel=0.05)
    assert "resnet18_cifar" in capsys.readouterr().out


def test_with_a_large_vocabulary_selection_takes_less_memory_than_the_step_on_its_picks(tmp_path):
    out = tmp_path / "memory.csv"
    main(["memory", "--models", "causal_lm", "--samples", "16", "--picks", "4", "--out", str(out)])
    (row,) = csv.DictReader(out.open())
    assert float(row["selection, microbatches (MiB)"]) < float(row["training step (MiB)"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picks", "0"], "expected a positive integer, got '0'"),
        (["--samples", "16", "--picks", "16"], "expected fewer than the smallest minibatch, 16"),
        (["--models", "gpt5"], "invalid choice: 'gpt5'"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["memory", *arguments])
    assert message in capsys.readouterr().err
