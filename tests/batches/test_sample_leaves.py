"""Which leaves of a batch are per sample, and which are so only by chance."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from composer_gradmatch.batches import count_samples, take_samples
from composer_gradmatch.batches.sample_leaves import length, names_by_length, sample_names

M = 5
X, Y = torch.zeros(M, 2), torch.arange(M)
ITEMS = {
    "tensors": lambda n, least=1: [torch.zeros(least + i, 2) for i in range(n)],
    "scalar tensors": lambda n, least=0: list(torch.arange(n).unbind()),
    "arrays": lambda n, least=1: [np.zeros(least + i) for i in range(n)],
    "dicts": lambda n, least=0: [{"boxes": torch.zeros(least + i, 4), "label": i} for i in range(n)],
    "strings": lambda n, least=0: [str(i) for i in range(n)],
    "numbers": lambda n, least=0: list(range(n)),
    "objects": lambda n, least=7: [SimpleNamespace(x=torch.zeros(least + i)) for i in range(n)],
}
items = pytest.mark.parametrize("make", ITEMS.values(), ids=ITEMS.keys())
PACKED = pack_sequence([torch.zeros(2)] * M)


class Opaque:
    """M samples that nobody can reach."""

    def __len__(self):
        return M


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        (X, {""}),
        (X.numpy(), {""}),
        ((X, Y), {"0", "1"}),
        ({"x": X, "y": {"z": [Y, X]}, "w": torch.zeros(7)}, {"x", "y.z.0", "y.z.1"}),
        (SimpleNamespace(x=X, name="train", y=Y), {"x", "y"}),
        ((X, torch.tensor(1.0), None, "five!", 5), {"0"}),
        # An empty tensor is of no sample.
        ((X, torch.zeros(0, M)), {"0"}),
        ((X, np.zeros((M, 0))), {"0", "1"}),
        # Text and sets have lengths that are not those of samples.
        ((X, {"a", "b", "c", "d", "e"}, b"five!", torch.Size([1] * M)), {"0"}),
        ((X, range(M)), {"0", "1"}),
    ],
)
def test_sample_leaves_have_the_samples_length(batch, names):
    assert sample_names(batch, M) == names


@items
@pytest.mark.parametrize("n", [2, 3, M])
def test_a_list_of_one_item_for_each_sample_is_one_leaf(make, n):
    assert sample_names((X[:n], make(n)), n) == {"0", "1"}


@items
@pytest.mark.parametrize("n", [2, 3, M])
def test_a_list_of_one_item_for_each_sample_counts_them(make, n):
    assert count_samples((torch.zeros(n, 9), make(n))) == n
    assert count_samples({"x": torch.zeros(n, 9), "y": make(n)}, "x", "y") == n


@items
def test_a_list_of_another_length_is_no_sample_leaf(make):
    assert sample_names((X, make(M + 2, M + 1)), M) == {"0"}


@items
def test_the_list_of_one_sample_is_picked_whole_however_it_is_read(make):
    taken = take_samples((X[:1], make(1)), torch.tensor([0]), 1)
    assert repr(taken[1]) == repr(make(1))


@settings(max_examples=50)
@given(n=st.integers(2, 6), width=st.integers(1, 6))
def test_views_that_all_have_the_samples_length_are_a_nest(n, width):
    views = [torch.full((n, width), float(i)) for i in range(n)]
    assert sample_names((views, torch.zeros(n)), n) == {*(f"0.{i}" for i in range(n)), "1"}
    taken, _ = take_samples((views, torch.zeros(n)), torch.tensor([1]), n)
    assert [view.shape for view in taken] == [(1, width)] * n


@settings(max_examples=50)
@given(n=st.integers(2, 6), sizes=st.lists(st.integers(1, 9), min_size=6, max_size=6))
def test_samples_of_other_sizes_are_no_nest(n, sizes):
    if n in sizes[:n]:
        sizes = [size + n for size in sizes]
    samples = [torch.full((size,), float(i)) for i, size in enumerate(sizes[:n])]
    taken, at = take_samples((samples, torch.arange(n)), torch.tensor([1, 0]), n)
    assert (len(taken), at.tolist()) == (2, [1, 0])
    assert taken[0] is samples[1]
    assert taken[1] is samples[0]


@settings(max_examples=50)
@given(
    num_classes=st.integers(1, 8),
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    make=st.sampled_from([torch.zeros, np.zeros, lambda n: [str(i) for i in range(n)], range]),
)
def test_class_weights_are_remembered_from_any_batch_of_another_size(num_classes, sizes, make):
    def batch(n):
        return {"x": torch.zeros(n, 9), "in": {"classes": make(num_classes)}}

    seen = frozenset().union(*(names_by_length(batch(n), n) for n in sizes))
    remembered = any(n != num_classes for n in sizes)
    assert seen == ({"in.classes"} if remembered else frozenset())
    names = sample_names(batch(num_classes), num_classes, seen)
    assert names == ({"x"} if remembered else {"x", "in.classes"})
    taken = take_samples(batch(num_classes), torch.tensor([0]), num_classes, seen)
    assert (len(taken["x"]), len(taken["in"]["classes"])) == (1, num_classes if remembered else 1)


@pytest.mark.parametrize("shape", [(M,), (M, 3)])
def test_what_is_remembered_is_kept_itself(shape):
    classes = torch.zeros(shape)
    taken = take_samples((X, classes), torch.tensor([3]), M, frozenset({"1"}))
    assert taken[1] is classes


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((X, Y), {}),
        ((X, torch.zeros(3), torch.tensor(1.0), "text"), {"1": 3}),
        ((X, torch.zeros(0)), {}),
        ({"x": X, "in": {"w": np.zeros(7)}}, {"in.w": 7}),
        # The lengths of samples' own tensors are no lengths of the batch's.
        ((X, [torch.zeros(3) for _ in range(M)]), {"1.*": 3}),
        ((X, [str(i) for i in range(M)]), {}),
    ],
)
def test_other_lengths_are_named(batch, found):
    named = names_by_length(batch, M)
    # A tuple of parts is named as one, too.
    assert {name: n for name, n in named.items() if name} == found
    assert not sample_names(batch, M) & named.keys()


def test_nothing_remembered_makes_a_sample_leaf():
    batch = {"x": X, "w": torch.zeros(3)}
    assert sample_names(batch, M, frozenset({"elsewhere"})) == {"x"}
    assert sample_names(batch, M, frozenset({"w", "x"})) == frozenset()


@pytest.mark.parametrize("around", [lambda part: part, lambda part: (X, part), lambda part: {"in": [X, {"p": part}]}])
@pytest.mark.parametrize(("part", "message"), [(PACKED, "PackedSequence.*pad_sequence"), (Opaque(), "5 samples in a")])
def test_what_cannot_be_picked_from_is_refused_wherever_it_is(around, part, message):
    with pytest.raises(ValueError, match=message):
        sample_names(around(part), M)


def test_an_opaque_object_of_another_length_or_left_whole_is_passed_through():
    assert sample_names((torch.zeros(3), Opaque()), 3) == {"0"}
    assert sample_names((X, Opaque()), M, frozenset({"1"})) == {"0"}


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [(X, M), (torch.tensor(1.0), None), (np.zeros(3), 3), ([1, 2], 2), ("ab", None), (range(4), 4), (7, None)],
)
def test_only_arrays_and_lists_have_a_length(leaf, expected):
    assert length(leaf) == expected
