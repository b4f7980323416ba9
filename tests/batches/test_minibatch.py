"""Batches of every kind as rows: counted, taken apart, and left alone where they are not per sample."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding

from composer_gradmatch.batches import copy_batch, count_samples, names_by_length, take_samples
from composer_gradmatch.batches.nests import named_leaves

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


class Slots:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


class Store(MutableMapping):
    """A mapping with a dict of its own, which a shallow copy shares."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    x: Any
    y: Any


KINDS = {
    "namespace": lambda x, y: SimpleNamespace(x=x, y=y),
    "slots": Slots,
    "frozen": Frozen,
    "frozen slots": FrozenSlots,
    "store": lambda x, y: Store(x=x, y=y),
    "user dict": lambda x, y: UserDict(x=x, y=y),
    "proxy": lambda x, y: MappingProxyType({"x": x, "y": y}),
    "deque": lambda x, y: deque([x, y]),
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"x": x, "y": y},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
SAMPLES = {
    "lists": [[0], [1, 2], [], [3], [4, 5, 6]],
    "tensors": [torch.full((1 + i,), float(i)) for i in range(M)],
    "tensors, one of M rows": [torch.zeros(i + 3, 4) for i in range(M)],
    "scalar tensors": list(torch.arange(M).unbind()),
    "arrays": [np.full(1 + i, i) for i in range(M)],
    "dicts": [{"boxes": torch.full((i, 4), float(i)), "label": i} for i in range(M)],
    "objects": [SimpleNamespace(mask=torch.zeros(i, 2)) for i in range(M)],
    "tuples": [(torch.zeros(3), i) for i in range(M)],
    "strings": list("abcde"),
    "strings and none": ["a", None, "c", None, "e"],
    "sets": [{i} for i in range(M)],
}
lists_of_samples = pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES.keys())


def parts_of(batch):
    """The two parts of a batch of ``KINDS``."""
    if isinstance(batch, Mapping):
        return [batch["x"], batch["y"]]
    return list(batch) if isinstance(batch, tuple | deque) else [batch.x, batch.y]


@kinds
def test_samples_of_any_kind_are_counted_without_keys(kind):
    assert count_samples(kind(INPUTS, TARGETS)) == M


@kinds
@lists_of_samples
def test_a_list_of_samples_is_picked_from_item_by_item(kind, samples):
    taken = take_samples(kind(INPUTS, samples), torch.tensor([3, 1, 1]), M)
    assert [id(item) for item in parts_of(taken)[1]] == [id(samples[i]) for i in (3, 1, 1)]


@kinds
@lists_of_samples
def test_a_batch_that_is_picked_from_keeps_its_own(kind, samples):
    batch = kind(INPUTS, samples)
    before = [id(INPUTS), *map(id, samples)]
    taken = take_samples(batch, torch.tensor([3, 1]), M)
    parts_of(taken)[0].zero_()
    assert [id(parts_of(batch)[0]), *map(id, parts_of(batch)[1])] == before
    assert INPUTS.sum() == 45


@kinds
def test_what_is_picked_has_the_batchs_type(kind):
    batch = kind(INPUTS, TARGETS)
    taken = take_samples(batch, torch.tensor([3, 1]), M)
    assert (type(taken), parts_of(taken)[1].tolist()) == (type(batch), [3, 1])


@lists_of_samples
@pytest.mark.parametrize("target_key", ["y", (lambda batch: batch["y"], dict.update)], ids=["key", "getter"])
def test_a_list_of_samples_has_its_length(samples, target_key):
    assert count_samples({"x": INPUTS, "y": samples}, "x", target_key) == M


@pytest.mark.parametrize("make", [lambda rows: rows, lambda rows: rows.numpy()], ids=["tensor", "array"])
def test_one_tensor_is_a_batch(make):
    batch = make(torch.arange(20.0).reshape(M, 4))
    assert count_samples(batch) == M
    assert take_samples(batch, torch.tensor([3, 1]), M)[:, 0].tolist() == [12.0, 4.0]


@pytest.mark.parametrize("samples", [list("abcde"), [(torch.zeros(3), torch.tensor(i)) for i in range(M)]])
def test_a_list_of_single_samples_is_a_batch(samples):
    assert count_samples(samples) == M
    assert take_samples(samples, torch.tensor([3, 1]), M) == [samples[3], samples[1]]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("indices", [torch.tensor([3, 1]), slice(1, 4, 2)])
def test_nested_tensors_are_picked_from(layout, indices):
    rows = [torch.full((i + 1,), float(i)) for i in range(M)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Torch's, that strided nested tensors are a prototype.
        batch = (torch.nested.nested_tensor(rows, layout=layout), TARGETS)
        assert count_samples(batch) == M
        taken, targets = take_samples(batch, indices, M)
    assert [len(row) - 1 for row in taken.unbind()] == targets.tolist()


def test_two_views_of_two_samples_are_a_nest():
    left, right = torch.zeros(2, 3), torch.ones(2, 3)
    taken = take_samples(([left, right], TARGETS[:2]), torch.tensor([1]), 2)
    assert [part.shape for part in taken[0]] == [(1, 3), (1, 3)]


def test_three_parts_of_which_one_is_no_samples_are_a_nest_of_three_samples():
    classes = torch.zeros(7)
    taken = take_samples((INPUTS[:3], TARGETS[:3], classes), torch.tensor([1]), 3)
    assert (taken[1].tolist(), taken[2] is classes) == ([1], True)


@pytest.mark.parametrize(
    ("shown", "batch", "picked"),
    [
        ({"x": INPUTS, "w": torch.zeros(3)}, {"x": INPUTS[:3], "w": torch.zeros(3)}, {"x": 1, "w": 3}),
        ({"x": INPUTS, "w": list("abc")}, {"x": INPUTS[:3], "w": list("abc")}, {"x": 1, "w": 3}),
        # Five images of three channels in a list, and then three.
        (
            {"x": INPUTS, "w": [torch.zeros(3, 2)] * 5},
            {"x": INPUTS[:3], "w": [torch.zeros(3, 2)] * 3},
            {"x": 1, "w": 1},
        ),
        # A nest of an array and a number for all.
        (
            {"x": INPUTS, "w": [INPUTS, torch.tensor(1.0)]},
            {"x": INPUTS[:2], "w": [INPUTS[:2], torch.tensor(1.0)]},
            {"x": 1, "w": 2},
        ),
    ],
    ids=["class weights", "class names", "images", "nest"],
)
def test_other_batches_show_what_is_per_sample(shown, batch, picked):
    whole = frozenset(names_by_length(shown, M))
    taken = take_samples(batch, torch.tensor([1]), len(batch["x"]), whole)
    assert {key: len(value) for key, value in taken.items()} == picked


def test_a_microbatch_shows_what_was_left_whole():
    batch = {"x": INPUTS, "classes": torch.zeros(M)}
    assert names_by_length(batch, M) == {}
    assert names_by_length({**batch, "x": INPUTS[:2]}, 2) == {"classes": M}


def test_a_tensor_that_is_there_twice_stays_one():
    inner = {"x": INPUTS}
    taken = take_samples((inner, TARGETS, inner, INPUTS), torch.tensor([3, 1]), M)
    assert taken[0] is taken[2]
    assert taken[0]["x"] is taken[3]


class Packed:
    """M samples, whose rows nobody knows."""

    def __len__(self):
        return M


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (SimpleNamespace(name="train"), "the batch, a SimpleNamespace: it holds no tensor, array or list of 5 samples"),
        ({"x": INPUTS[:4]}, "the batch, a dict"),
        ((INPUTS, Packed()), r"5 samples in a Packed \(1\)"),
        ((pack_sequence([torch.zeros(2)] * M), TARGETS), "PackedSequence"),
        (Packed(), "5 samples in a Packed, from which"),
    ],
)
def test_what_cannot_be_picked_from_is_an_error(batch, message):
    with pytest.raises(ValueError, match=message):
        take_samples(batch, torch.tensor([3, 1]), M)


def test_a_graph_batch_has_no_rows_for_samples():
    graph = SimpleNamespace(x=torch.zeros(9, 2), edge_index=torch.zeros(2, 12), y=TARGETS)
    with pytest.raises(ValueError, match=r"disagree.*x of shape \(9, 2\)"):
        count_samples(graph)


@kinds
@lists_of_samples
def test_a_copy_holds_the_same(kind, samples):
    batch = kind(INPUTS, samples)
    assert shown(copy_batch(batch)) == shown(batch)


@kinds
@lists_of_samples
def test_a_copy_shares_no_memory_and_no_container(kind, samples):
    batch = kind(INPUTS, samples)
    before = shown(batch)
    inputs, targets = parts_of(copy_batch(batch))
    for _, leaf in named_leaves([inputs, targets]):
        if isinstance(leaf, torch.Tensor | np.ndarray):
            leaf *= 0
    for item in targets:
        if isinstance(item, list | dict):
            item.clear()
    targets.clear()
    assert shown(batch) == before


def shown(batch):
    """A batch's leaves, to be compared."""
    return [
        (name, leaf.tolist() if isinstance(leaf, torch.Tensor | np.ndarray) else leaf)
        for name, leaf in named_leaves(batch)
    ]


def test_a_copy_of_a_view_is_compact():
    copied = copy_batch({"x": torch.zeros(M, 1000)[:, ::2][:, :3]})["x"]
    assert copied.untyped_storage().nbytes() == 4 * 3 * M


def test_a_copy_keeps_twins():
    copied = copy_batch((INPUTS, {"x": INPUTS}))
    assert copied[0] is copied[1]["x"]


def test_a_copy_is_let_go_of_at_once():
    gc.disable()
    try:
        copied = weakref.ref(copy_batch([INPUTS, {"x": INPUTS}])[0])
        assert copied() is None
    finally:
        gc.enable()


@st.composite
def nests(draw, depth=2):
    """A nest of M samples, and the same as a function of the picks, made independently."""
    kind = draw(
        st.sampled_from(["tensor", "array", "strings", "scalars", "whole"] + ["dict", "tuple", "object"] * depth)
    )
    if kind in ("dict", "tuple", "object"):
        parts = [draw(nests(depth - 1)) for _ in range(draw(st.integers(1, 3)))]
        build = {
            "dict": lambda items: {f"k{i}": item for i, item in enumerate(items)},
            "tuple": lambda items: (*items, torch.tensor(1.0)),
            "object": lambda items: SimpleNamespace(**{f"k{i}": item for i, item in enumerate(items)}),
        }[kind]
        return build([part for part, _ in parts]), lambda at: build([pick(at) for _, pick in parts])
    width = draw(st.integers(6, 9))
    rows = [[100 * i + j for j in range(width)] for i in range(M)]
    if kind == "whole":
        return torch.tensor(rows).T, lambda at: torch.tensor(rows).T
    make = {
        "tensor": torch.tensor,
        "array": np.array,
        "strings": lambda rows: [str(row) for row in rows],
        "scalars": lambda rows: [torch.tensor(row[0]) for row in rows],
    }[kind]
    return make(rows), lambda at: make([rows[i] for i in at])


@given(nest=nests(), picks=st.lists(st.integers(0, M - 1), min_size=1, max_size=2 * M))
def test_picks_are_those_of_an_independent_oracle(nest, picks):
    batch, picked = nest
    taken = take_samples((TARGETS, batch, "name"), torch.tensor(picks), M)
    assert shown(taken) == shown((torch.tensor(picks), picked(picks), "name"))
