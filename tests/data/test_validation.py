"""The validation part: disjoint, drawn by the seed alone, and without the injected label noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, TensorDataset

from composer_gradmatch.data import digits, validation_part
from composer_gradmatch.train import check_config
from composer_gradmatch.train.builders import build_loader
from composer_gradmatch.train.config import ConfigError, load_config

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
NOISE = {"fraction": 0.5, "seed": 3}


def numbered(size):
    return TensorDataset(torch.arange(size), torch.zeros(size, dtype=torch.int64))


@given(size=st.integers(2, 300), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_the_parts_are_disjoint_and_make_the_whole(size, fraction, seed):
    split = round(fraction * size)
    if not 0 < split < size:
        with pytest.raises(ValueError, match="leaves"):
            validation_part(numbered(size), fraction, seed)
        return
    train, held = (validation_part(numbered(size), fraction, seed, part) for part in ("train", "validation"))
    assert len(held) == split
    assert sorted([*train.indices, *held.indices]) == list(range(size))


def test_the_seed_alone_draws():
    torch.manual_seed(1)
    first = validation_part(numbered(100), 0.1, 0).indices
    torch.manual_seed(2)
    assert validation_part(numbered(100), 0.1, 0).indices == first
    assert validation_part(numbered(100), 0.1, 1).indices != first


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("data", "arguments", "expected"),
    [
        (numbered(10), (0.0, 0), r"in \(0, 1\)"),
        (numbered(10), (1.0, 0), r"in \(0, 1\)"),
        (numbered(10), (0.01, 0), "leaves 0 to validate on and 10 to train on"),
        (numbered(10), (0.5, 0, "test"), "'train' or 'validation', got 'test'"),
        (Stream(), (0.1, 0), "a stream"),
    ],
)
def test_what_is_no_split_is_refused(data, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        validation_part(data, *arguments)


def test_label_noise_is_in_the_training_part_alone():
    section = {"name": "digits", "dataset": {"split": "train"}, "label_noise": NOISE}
    whole = build_loader(section, 8, "train_loader").dataset
    split = {"fraction": 0.1, "seed": 5}
    train = build_loader({**section, "validation": split}, 8, "train_loader").dataset
    held = build_loader({**section, "validation": {**split, "part": "validation"}}, 8, "eval_loader").dataset
    own = digits("train")
    assert len(held) == 144
    assert all(held[i][1] == own[row][1] for i, row in enumerate(held.indices))
    assert [int(train[i][1]) for i in range(len(train))] == [int(whole[row][1]) for row in train.indices]
    changed = sum(int(train[i][1]) != int(own[row][1]) for i, row in enumerate(train.indices))
    assert changed == pytest.approx(0.45 * len(train), rel=0.15)


def test_a_config_may_hold_it_and_is_told_what_is_wrong_with_it():
    overrides = ["train_loader.validation={fraction: 0.1, seed: 0}"]
    check_config(load_config(DIGITS, overrides))
    with pytest.raises(ConfigError, match=r"train_loader.validation.share: unknown key; Valid: fraction, part, seed"):
        check_config(load_config(DIGITS, ["train_loader.validation={share: 0.1, seed: 0}"]))
