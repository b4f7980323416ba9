"""What a reader knows of a batch by its outline is what a look into it finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_gradmatch.batches.minibatch import count_samples
from composer_gradmatch.batches.reader import BatchReader
from composer_gradmatch.batches.sample_leaves import names_by_length, sample_names

SHAPES = [(), (2,), (3,), (3, 2), (2, 3), (5,)]
TENSORS = st.builds(torch.zeros, st.sampled_from(SHAPES), dtype=st.sampled_from([torch.float32, torch.int64]))
LEAVES = st.one_of(TENSORS, TENSORS, TENSORS, st.sampled_from([1.5, "a", None, [1, 2, 3]]))
BATCHES = st.one_of(
    st.lists(LEAVES, min_size=2, max_size=4),
    st.lists(LEAVES, min_size=2, max_size=4).map(tuple),
    st.dictionaries(st.sampled_from(["x", "y", "labels", 0, 1]), LEAVES, min_size=2),
)


def _tried(find):
    try:
        return find()
    except ValueError as error:
        return str(error)


@given(st.lists(BATCHES, min_size=1, max_size=6), st.sampled_from([(0, 1), ("x", "labels")]))
def test_batches_are_read_as_if_each_were_the_first_of_its_outline(batches, keys):
    reader, whole = BatchReader(*keys), set()
    for batch in [*batches, *batches]:
        n = _tried(lambda: count_samples(batch, *keys))  # noqa: B023
        assert _tried(lambda: reader.count(batch)) == n  # noqa: B023
        if isinstance(n, str):
            continue
        whole |= names_by_length(batch, n).keys()
        reader.learn(batch, n)
        assert reader.not_per_sample == whole
        names = _tried(lambda: sample_names(batch, n, whole))  # noqa: B023
        assert _tried(lambda: reader.names(batch, n)) == names  # noqa: B023


def test_what_is_learned_of_one_outline_counts_for_others():
    reader, batch = BatchReader(), (torch.zeros(3, 2), torch.zeros(3), torch.zeros(3))
    assert reader.names(batch, 3) == {"0", "1", "2"}
    reader.learn((torch.zeros(2, 2), torch.zeros(2), torch.zeros(3)), 2)
    assert reader.names(batch, 3) == {"0", "1"}
    reader.reset()
    assert reader.names(batch, 3) == {"0", "1", "2"}


def test_getters_see_each_batch():
    reader = BatchReader(lambda batch: batch[0][: int(batch[1][0])], lambda batch: batch[1][: int(batch[1][0])])
    for n in (2, 3):
        assert reader.count((torch.zeros(3), torch.full((3,), n))) == n


def test_outlines_are_not_kept_without_end(monkeypatch):
    monkeypatch.setattr("composer_gradmatch.batches.reader._OUTLINES", 3)
    reader = BatchReader()
    for n in range(1, 9):
        assert reader.count((torch.zeros(n), torch.zeros(n))) == n
        assert len(reader._found) <= 3


@pytest.mark.parametrize("key", [0, "x"])
def test_a_subclass_of_tensor_is_looked_into(key):
    class Tagged(torch.Tensor):
        pass

    batch = {"x": torch.zeros(3).as_subclass(Tagged), "y": torch.zeros(3)} if key == "x" else (torch.zeros(3),) * 2
    assert BatchReader(key, "y" if key == "x" else 1).count(batch) == 3
