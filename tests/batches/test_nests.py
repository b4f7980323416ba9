"""Nests of any kind: their leaves, the same nest with other leaves, and picks against a slow oracle."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_gradmatch.batches import copy_batch, take_samples
from composer_gradmatch.batches.nests import children, map_nest, named_leaves, resized

M = 5
Fields = namedtuple("Fields", ["a", "b"])


@dataclasses.dataclass
class Record:
    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    a: Any
    b: Any


class Slots:
    __slots__ = ("a",)

    def __init__(self, a, b):
        self.a, self.b = a, b


class MoreSlots(Slots):
    """One attribute in a slot of its parent, one in its own, and one that was never set."""

    __slots__ = ("b", "never")


class Strict(tuple):
    """A tuple with a constructor of its own, and an attribute."""

    def __new__(cls, first, second):
        made = super().__new__(cls, (first, second))
        made.note = "kept"
        return made


MAPPINGS = {
    "dict": dict,
    "ordered": OrderedDict,
    "default": lambda items: defaultdict(list, items),
    "user dict": UserDict,
    "proxy": MappingProxyType,
}
PAIRS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "deque": lambda a, b: deque([a, b], maxlen=9),
    "user list": lambda a, b: UserList([a, b]),
    "strict": Strict,
    **{kind.__name__: kind for kind in (Fields, Record, Frozen, FrozenSlots, MoreSlots)},
    "namespace": lambda a, b: SimpleNamespace(a=a, b=b),
    **{name: lambda a, b, make=make: make({"a": a, "b": b}) for name, make in MAPPINGS.items()},
}
pairs = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS.keys())
#: What one sample is in each kind of leaf, and how samples are put together.
LEAVES = {
    "matrix": (lambda i: [10 * i, 10 * i + 1], torch.tensor),
    "labels": (lambda i: i, torch.tensor),
    "half": (lambda i: [i / 2, float(i)], lambda rows: torch.tensor(rows, dtype=torch.float16)),
    "array": (lambda i: [i, -i], np.array),
    "text array": (lambda i: f"s{i}", np.array),
    "tensors": (lambda i: torch.full((1 + i, 2), i), list),
    "scalar tensors": (torch.tensor, list),
    "arrays": (lambda i: np.full(1 + i, i), tuple),
    "dicts": (lambda i: {"boxes": torch.full((i, 4), i), "label": i}, list),
    "records": (lambda i: Record(torch.full((i + 7,), i), f"s{i}"), list),
    "strings": (str, list),
    "numbers": (lambda i: i + 0.5, deque),
}
WHOLE = {"scalar": torch.tensor(1.5), "classes": torch.zeros(7), "text": "train", "none": None, "step": 3}


@st.composite
def recipes(draw, depth=3):
    """A function of the picks that makes a nest of these samples, without what is tested here."""
    kind = draw(st.sampled_from(["leaf", "whole", "pair", "pair"] if depth else ["leaf", "whole"]))
    if kind == "pair":
        make, one, other = draw(st.sampled_from(list(PAIRS))), draw(recipes(depth - 1)), draw(recipes(depth - 1))
        # A part with an array in it, so that a pair is one of parts.
        return lambda at: PAIRS[make]((one(at), torch.tensor(at)), other(at))
    if kind == "whole":
        held = WHOLE[draw(st.sampled_from(list(WHOLE)))]
        return lambda at: held
    sample, collate = LEAVES[draw(st.sampled_from(list(LEAVES)))]
    return lambda at: collate([sample(i) for i in at])


def content(value: Any) -> Any:
    """Types, names and values of a nest, to be compared with ``==``; written for the kinds in this file."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value), value.dtype, tuple(value.shape), value.tolist()
    if isinstance(value, Mapping):
        return type(value), [(key, content(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque | UserList):
        return type(value), getattr(value, "note", None), [content(item) for item in value]
    if isinstance(value, Record | Frozen | FrozenSlots | Slots | SimpleNamespace):
        return type(value), content(value.a), content(value.b), hasattr(value, "never")
    return value


@settings(max_examples=100)
@given(recipe=recipes(), picks=st.lists(st.integers(0, M - 1), min_size=1, max_size=2 * M))
def test_picks_are_the_nest_of_the_picked_samples_and_change_nothing(recipe, picks):
    batch = (torch.arange(M), recipe(range(M)))
    before, identities = content(batch), [id(leaf) for _, leaf in named_leaves(batch)]
    taken = take_samples(batch, torch.tensor(picks), M)
    assert content(taken) == content((torch.tensor(picks), recipe(picks)))
    assert content(batch) == before
    assert [id(leaf) for _, leaf in named_leaves(batch)] == identities


@settings(max_examples=50)
@given(recipe=recipes(), start=st.integers(0, M - 1), step=st.integers(1, 3))
def test_slices_are_the_nest_of_their_samples(recipe, start, step):
    taken = take_samples((torch.arange(M), recipe(range(M))), slice(start, M, step), M)
    at = list(range(start, M, step))
    assert content(taken) == content((torch.tensor(at), recipe(at)))


@settings(max_examples=50)
@given(recipe=recipes())
def test_copies_hold_the_same_in_memory_of_their_own(recipe):
    batch = (torch.arange(M), recipe(range(M)))
    before = content(batch)
    copied = copy_batch(batch)
    assert content(copied) == before
    for _, leaf in named_leaves(copied):
        if isinstance(leaf, torch.Tensor):
            leaf.zero_()
        elif isinstance(leaf, np.ndarray):
            leaf[...] = 0
    assert content(batch) == before


@pairs
def test_a_tensor_in_two_places_stays_one(make):
    shared = torch.arange(M)
    for made in (take_samples(make(shared, [shared]), torch.tensor([3, 1]), M), copy_batch(make(shared, [shared]))):
        one, other = (leaf for _, leaf in named_leaves(made))
        assert one is other
        assert one is not shared


@pairs
def test_a_container_in_two_places_stays_one(make):
    shared = {"x": torch.arange(M)}
    one, other = (item for _, item in children(copy_batch(make(shared, shared))) or ())
    assert one is other
    assert one is not shared


@pairs
def test_leaves_are_named_by_the_keys_that_lead_to_them(make):
    x, y = torch.zeros(2), torch.ones(2)
    leaves = dict(named_leaves({"in": make(x, [y])}))
    assert set(leaves) in ({"in.0", "in.1.0"}, {"in.a", "in.b.0"})
    assert leaves[min(leaves)] is x
    assert leaves[max(leaves)] is y


@pairs
def test_a_named_container_is_a_leaf(make):
    inner = make(torch.zeros(2), 1)
    assert [(name, id(leaf)) for name, leaf in named_leaves({"x": inner}, {"x"})] == [("x", id(inner))]


def test_keys_with_dots_are_told_from_paths():
    assert [name for name, _ in named_leaves({"a.b": 1, "a": {"b": 2}})] == ["a\\.b", "a.b"]


def test_twins_are_visited_once_or_each_time():
    inner, visits = [1], []
    map_nest(lambda name, leaf: visits.append(name), (inner, inner))
    assert visits == ["0.0"]
    map_nest(lambda name, leaf: visits.append(name), (inner, inner), twins=False)
    assert visits == ["0.0", "0.0", "1.0"]


def test_a_twin_that_is_a_leaf_at_one_name_only_is_not_mixed_up():
    inner = [1, 2]
    made = map_nest(lambda _, leaf: ("leaf", leaf), (inner, inner), {"1"})
    assert made == ([("leaf", 1), ("leaf", 2)], ("leaf", inner))


def test_a_nest_in_itself_ends():
    x = torch.arange(M)
    around = {"x": x}
    around["self"] = around
    assert [name for name, _ in named_leaves(around)] == ["x", "self"]
    assert copy_batch(around)["x"].tolist() == x.tolist()


@pytest.mark.parametrize("value", [torch.zeros(2), np.zeros(2), "text", b"b", 1, None, torch.Size([2]), range(3), int])
def test_a_leaf_has_no_parts(value):
    assert children(value) is None


def test_an_object_of_plain_values_is_a_leaf():
    assert children(SimpleNamespace(name="train", step=3)) is None


def test_a_bound_and_attributes_are_kept():
    assert resized(deque([1, 2], maxlen=4), [3]).maxlen == 4
    assert resized(Strict(1, 2), [3]).note == "kept"


@pytest.mark.parametrize("size", [0, 2, 20])
@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_flat_batches_are_read_as_others_are(kind, size):
    leaves = [torch.arange(M) + i for i in range(size)]
    flat = {f"a.{i}": leaf for i, leaf in enumerate(leaves)} if kind is dict else kind(leaves)
    other = UserDict(flat) if kind is dict else UserList(flat)
    assert [(name, id(leaf)) for name, leaf in named_leaves(flat)] == [
        (name, id(leaf)) for name, leaf in named_leaves(other)
    ]
    mapped = [map_nest(lambda name, leaf: (name, id(leaf)), each) for each in (flat, other)]
    assert type(mapped[0]) is kind
    assert list(mapped[0]) == list(mapped[1])
    assert named_leaves(flat, {""}) == [("", flat)]
    assert map_nest(lambda name, leaf: [name, leaf], flat, {""}) == ["", flat]
