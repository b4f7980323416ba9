"""Rows of tensors and lists, by their place in memory and by codes of their contents."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_gradmatch.batches.picked_rows import RowRecord
from composer_gradmatch.batches.row_codes import codes_of_objects, codes_of_tensors, is_all_of, rows_in_memory

N = 6
WEIGHTS = torch.tensor([0.5, 1.5, 2.0, 0.25, 1.0, 0.75])
INPUTS = torch.arange(12.0).reshape(N, 2)
BASE = torch.arange(48).reshape(8, 6)
WHOLES = {
    "plain": BASE,
    "columns": BASE.T,
    "every other": BASE[::2],
    "inner": BASE[1:, 1:4],
    "deep": BASE.view(4, 2, 6),
}


@settings(max_examples=200)
@given(
    kind=st.sampled_from(list(WHOLES)),
    size=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    stride=st.tuples(st.integers(0, 14), st.integers(1, 7)),
    offset=st.integers(0, 47),
)
def test_a_view_is_never_taken_for_rows_that_it_does_not_show(kind, size, stride, offset):
    last = offset + sum((number - 1) * step for number, step in zip(size, stride, strict=True))
    if last >= BASE.numel():
        return
    whole, part = WHOLES[kind], BASE.as_strided(size, stride, offset)
    for mine, row in zip(part, rows_in_memory(part, whole) or [], strict=False):
        assert set(mine.tolist()) <= set(whole[row].flatten().tolist())


@settings(max_examples=50)
@given(start=st.integers(0, 7), step=st.integers(1, 3), left=st.integers(0, 5), cut=st.integers(1, 6))
def test_slices_of_rows_and_of_what_is_in_them_are_found(start, step, left, cut):
    part = BASE[start::step, left : left + cut]
    assert rows_in_memory(part, BASE) == list(range(start, 8, step))


def sparse():
    return [torch.eye(3).to_sparse() * (i + 1) for i in range(N)]


def tables():
    return [pd.DataFrame({"a": [i]}) for i in range(N)]


@pytest.mark.parametrize("make", [sparse, tables])
def test_samples_that_cannot_be_compared_leave_the_others_to_tell(make):
    record = RowRecord.of((INPUTS, make()), N)
    assert record.rows_now((INPUTS.flip(0), make())).tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("make", [sparse, tables])
def test_samples_that_cannot_be_compared_are_still_known_as_objects(make):
    samples = make()
    record = RowRecord.of((INPUTS, samples), N)
    assert record.rows_now((INPUTS.flip(0) * 2, samples[::-1])).tolist() == [5, 4, 3, 2, 1, 0]


def test_the_order_of_a_samples_keys_does_not_matter():
    record = RowRecord.of((INPUTS, [{"a": i, "b": -i} for i in range(N)]), N)
    batch = (INPUTS.flip(0) * 2, [{"b": -i, "a": i} for i in reversed(range(N))])
    assert record.rows_now(batch).tolist() == [5, 4, 3, 2, 1, 0]


def test_keys_are_told_from_each_other():
    now, recorded = codes_of_objects([{"a": 1, "b": 2}], [{"a": 2, "b": 1}, {"a": 1, "c": 2}])
    assert now.tolist() == [-1]
    assert len(set(recorded.tolist())) == 2


@pytest.mark.parametrize("nan", [float("nan"), complex("nan"), torch.tensor([1.0, float("nan")])])
def test_nan_in_a_list_equals_nan(nan):
    now, recorded = codes_of_objects([nan, nan * 1, "nan"], [nan * 1, "nan"])
    assert now.tolist() == [0, 0, 1]
    assert recorded.tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 0)])
def test_no_rows_have_no_codes(shape):
    codes = codes_of_tensors(torch.zeros(shape), torch.zeros((N, *shape[1:])))
    assert codes is not None
    assert (codes[0].tolist(), len(codes[1])) == ([], N)


@pytest.mark.parametrize("copy", [False, True])
def test_a_batch_without_rows_has_no_weights(copy):
    record = RowRecord.of((INPUTS, torch.arange(N)), N)
    empty = (INPUTS[:0].clone() if copy else INPUTS[:0], torch.arange(0))
    assert record.rows_now(empty).tolist() == []
    assert record.weights_now(empty, WEIGHTS).tolist() == []


def test_all_rows_are_told_from_others_of_the_same_memory():
    whole = torch.arange(12.0).reshape(4, 3)
    assert is_all_of(whole[:], whole)
    assert is_all_of(whole.view(4, 3), whole)
    others = [whole.flip(0), whole.clone(), whole[:3], whole.view(torch.int32), whole.T.reshape(4, 3)]
    assert not any(is_all_of(other, whole) for other in others)
    shown_twice = torch.zeros(1, 3).expand(4, 3)
    assert not is_all_of(shown_twice[:], shown_twice)
    assert not is_all_of(torch.zeros(4, 3).to_sparse(), torch.zeros(4, 3).to_sparse())
