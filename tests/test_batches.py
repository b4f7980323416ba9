"""Batches of every kind as rows: counted, taken apart, and left alone where they are not per sample."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from composer_gradmatch.batches import count_samples, take_samples

M = 5
INPUTS, TARGETS = torch.arange(10.0).reshape(M, 2), torch.arange(M)
Pair = namedtuple("Pair", ["inputs", "targets"])
PER_SAMPLE = {
    "tuple": (INPUTS, TARGETS),
    "list": [INPUTS, TARGETS],
    "named tuple": Pair(INPUTS, TARGETS),
    "arrays": (INPUTS.numpy(), TARGETS.numpy()),
    "list of strings": (INPUTS, ["a", "b", "c", "d", "e"]),
    "nested": ((INPUTS, {"mask": INPUTS > 3, "more": [TARGETS, TARGETS + 1]}), TARGETS),
    "dict": {"x": INPUTS, "y": TARGETS},
    "ordered dict": OrderedDict(x=INPUTS, y=TARGETS),
    "encoding": BatchEncoding({"input_ids": INPUTS, "labels": TARGETS}),
    "nested dict": {"inputs": {"ids": INPUTS, "mask": INPUTS > 3}, "labels": TARGETS},
}
batches = pytest.mark.parametrize("batch", PER_SAMPLE.values(), ids=PER_SAMPLE.keys())


def rows(value):
    """A batch as the list of its samples' leaves, whatever the kind."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple) and not isinstance(value[0], str):
        return [list(parts) for parts in zip(*map(rows, value), strict=True)]
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else list(value)


@batches
def test_samples_are_counted_without_keys(batch):
    assert count_samples(batch) == M


@batches
@given(data=st.data())
def test_the_picked_rows_are_taken_from_every_leaf(batch, data):
    picks = data.draw(st.lists(st.integers(0, M - 1), min_size=1, max_size=2 * M))
    before = rows(batch)
    taken = take_samples(batch, torch.tensor(picks), M)
    assert type(taken) is type(batch)
    assert rows(taken) == [before[i] for i in picks]
    assert rows(batch) == before


@batches
def test_a_slice_is_a_view(batch):
    assert rows(take_samples(batch, slice(1, 3), M)) == rows(batch)[1:3]
    if isinstance(batch, tuple) and isinstance(batch[0], torch.Tensor):
        assert take_samples(batch, slice(1, 3), M)[0].data_ptr() == batch[0][1:].data_ptr()


def test_what_is_not_per_sample_is_passed_through():
    extra = {"scale": torch.tensor(2.0), "classes": torch.zeros(3), "name": "train", "none": None, "step": 7}
    batch = {"x": INPUTS, "y": TARGETS, **extra}
    assert count_samples(batch, "x", "y") == M
    taken = take_samples(batch, torch.tensor([3, 1]), M)
    assert taken["y"].tolist() == [3, 1]
    assert all(taken[key] is value for key, value in extra.items())


@pytest.mark.parametrize(
    ("input_key", "target_key"),
    [("x", "y"), ((lambda batch: batch["x"], dict.update), (lambda batch: batch["y"], dict.update))],
    ids=["strings", "getters"],
)
def test_keys_are_composers(input_key, target_key):
    assert count_samples({"x": INPUTS, "y": TARGETS}, input_key, target_key) == M


@pytest.mark.parametrize(
    ("batch", "keys", "message"),
    [
        ({"x": INPUTS, "y": TARGETS[:4]}, (), r"disagree.*x of shape \(5, 2\), y of shape \(4,\)"),
        ({"x": INPUTS, "in": {"y": TARGETS[:4]}}, (), r"in\.y of shape \(4,\)"),
        ({"name": "train"}, (), "no tensor at all"),
        ({"x": INPUTS, "y": TARGETS}, ("x", "labels"), r"target_key='labels' names nothing.*keys \['x', 'y'\]"),
        ({"x": INPUTS, "y": TARGETS[:4]}, ("x", "y"), r"of shape \(5, 2\)\) have 5 samples.*of shape \(4,\)\) have 4"),
        ((INPUTS, torch.tensor(1.0)), (), r"target_key=1 names nothing with a leading length.*of shape \(\)"),
        (((INPUTS, TARGETS[:4]), TARGETS), (), r"input_key=0 names tensors that disagree.*\(5, 2\), of shape \(4,\)"),
        ((INPUTS,), (), "target_key=1 names nothing in the batch, a tuple of length 1"),
    ],
)
def test_what_cannot_be_counted_is_told_by_key_and_shape(batch, keys, message):
    with pytest.raises(ValueError, match=message):
        count_samples(batch, *keys)
