"""Picked samples recognised again: after other algorithms have changed the minibatch, and in microbatches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_gradmatch.batches import find_rows, match_rows, names_by_length, picked_rows, sample_names, take_samples
from composer_gradmatch.batches.picked_rows import ContradictionError, RowRecord

M, N = 12, 6
PICKS = torch.tensor([7, 2, 11, 0, 5, 9])
WEIGHTS = torch.tensor([0.5, 1.5, 2.0, 0.25, 1.0, 0.75])
INPUTS = torch.randn(M, 3, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(M) % 3
SAMPLES = {
    "tensors": lambda: [torch.full((1 + i % 3,), float(i)) for i in range(M)],
    "scalar tensors": lambda: list(torch.arange(M).unbind()),
    "dicts": lambda: [{"boxes": torch.full((i % 4, 4), float(i)), "label": i} for i in range(M)],
    "arrays": lambda: [np.full(1 + i % 3, i) for i in range(M)],
    "strings": lambda: [f"caption {i}" for i in range(M)],
    "numbers": lambda: list(range(M)),
    "labels": lambda: LABELS.clone(),
}
lists = pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES.keys())


def pick(batch):
    """The picked batch and its record."""
    names = sample_names(batch, M)
    picked = take_samples(batch, PICKS, M)
    return picked, RowRecord.of(picked, N, names, original=batch, indices=PICKS)


def reordered(batch, rows, size=N):
    """Copies of some rows, in an order."""
    return take_samples(batch, torch.as_tensor(rows), size)


@lists
@given(order=st.permutations(range(N)))
def test_an_order_is_found_again(make, order):
    picked, record = pick((INPUTS, make()))
    assert record.rows_now(reordered(picked, order)).tolist() == list(order)


@lists
@given(rows=st.lists(st.integers(0, N - 1), min_size=1, max_size=2 * N))
def test_some_rows_and_repeated_ones_are_found_again(make, rows):
    picked, record = pick({"x": INPUTS, "y": make()})
    assert record.weights_now(reordered(picked, rows), WEIGHTS).tolist() == WEIGHTS[rows].tolist()


@lists
def test_an_object_batch_is_recognised(make):
    picked, record = pick(SimpleNamespace(x=INPUTS, y=make()))
    assert record.rows_now(reordered(picked, [3, 1, 2])).tolist() == [3, 1, 2]


@lists
def test_microbatches_of_views_get_their_weights(make):
    picked, record = pick((INPUTS, make()))
    parts = [take_samples(picked, slice(i, i + 2), N) for i in range(0, N, 2)]
    assert torch.cat([record.weights_of(part, WEIGHTS) for part in parts]).tolist() == WEIGHTS.tolist()


@lists
def test_microbatches_of_copies_get_their_weights(make):
    picked, record = pick((INPUTS, make()))
    parts = [reordered(picked, [i, i - 1]) for i in range(N)]
    expected = [WEIGHTS[[i, i - 1]].tolist() for i in range(N)]
    assert [record.weights_of(part, WEIGHTS).tolist() for part in parts] == expected


@given(values=st.lists(st.integers(0, 2), min_size=N, max_size=N), order=st.permutations(range(N)))
def test_rows_that_are_alike_share_their_weight(values, order):
    batch = (torch.tensor(values), torch.tensor(values) * 2.0)
    weights = match_rows(reordered(batch, order), batch, WEIGHTS)
    contents = batch[1][list(order)]
    assert float((weights * contents).sum()) == pytest.approx(float((WEIGHTS * batch[1]).sum()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("rows", [[5, 4, 3, 2, 1, 0], [1, 1, 4]])
def test_nan_equals_nan(dtype, rows):
    inputs = torch.arange(N * 3).reshape(N, 3).to(dtype)
    inputs[:, 1] = float("nan")
    batch = (inputs, torch.zeros(N))
    assert match_rows(reordered(batch, rows), batch, WEIGHTS).tolist() == WEIGHTS[rows].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
def test_negative_zero_equals_zero(dtype):
    whole, part = torch.eye(N, dtype=dtype), torch.eye(N, dtype=dtype).flip(0)
    part[part == 0] = -0.0
    assert match_rows((part, part), (whole, whole), WEIGHTS).tolist() == WEIGHTS.flip(0).tolist()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
@given(data=st.data())
def test_rows_are_equal_where_all_their_elements_are(dtype, data):
    values = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=N, max_size=N))
    whole = torch.tensor(values, dtype=dtype)
    found = find_rows((whole.clone(),), (whole,), N, [True])
    assert found is not None
    assert found.tolist() == [values.index(row) for row in values]


def test_rows_that_differ_in_one_bit_are_not_equal():
    whole = torch.zeros(N, 1000)
    whole[torch.arange(N), torch.arange(N) * 7] = torch.finfo(torch.float32).tiny
    assert match_rows((whole.flip(0), whole.flip(0)), (whole, whole), WEIGHTS).tolist() == WEIGHTS.flip(0).tolist()


@pytest.mark.parametrize(
    "cut",
    [lambda x: x[:, :2], lambda x: x[:, ::2], lambda x: x[:, 1], lambda x: x[..., :1], lambda x: x.flatten(1)],
    ids=["truncated", "strided", "one", "narrow", "flat"],
)
@pytest.mark.parametrize("rows", [slice(0, 6), slice(2, 5), slice(0, 6, 2), slice(5, 6)])
def test_a_part_of_each_row_is_known_by_its_place(cut, rows):
    picked, record = pick((INPUTS, LABELS))
    part = (cut(picked[0])[rows], torch.zeros(len(range(N)[rows]), 9))
    assert record.weights_of(part, WEIGHTS).tolist() == WEIGHTS[rows].tolist()


def test_a_truncated_copy_is_known_by_what_is_left():
    picked, record = pick({"x": INPUTS})
    assert record.rows_now({"x": picked["x"][:, :2].contiguous().flip(0)}).tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    "view",
    [lambda x: x.reshape(2 * N, 6), lambda x: x.reshape(N // 2, 24), lambda x: x.transpose(0, 1)],
    ids=["halves", "pairs", "channels first"],
)
def test_a_view_of_other_rows_is_not_taken_for_samples(view):
    picked, record = pick({"x": INPUTS.reshape(M, 12)})
    x = view(picked["x"].reshape(N, 3, 4))
    with pytest.raises(ValueError, match="Cannot tell which"):
        record.rows_now({"x": x})


@pytest.mark.parametrize("in_place", [True, False])
def test_inputs_that_are_changed_leave_the_labels_to_tell(in_place):
    picked, record = pick([INPUTS.clone(), LABELS])
    if in_place:
        picked[0][:, 0] = 0.0
    else:
        picked[0] = picked[0] * 2
    assert record.rows_now(picked).tolist() == list(range(N))


def test_a_reorder_in_place_is_found_in_the_original():
    picked, record = pick((INPUTS.clone(), torch.arange(M)))
    order = [1, 0, 3, 2, 5, 4]
    for leaf in picked:
        leaf.copy_(leaf[order])
    assert record.rows_now(picked).tolist() == order


def test_a_reorder_of_arrays_in_place_is_found_in_the_original():
    picked, record = pick((INPUTS.numpy().copy(), np.arange(M)))
    order = [1, 0, 3, 2, 5, 4]
    for leaf in picked:
        leaf[:] = leaf[order]
    assert record.rows_now(picked).tolist() == order


def test_a_list_that_is_reordered_in_place_is_found():
    picked, record = pick({"x": SAMPLES["tensors"]()})
    picked["x"].reverse()
    assert record.rows_now(picked).tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("kind", ["copied", "in place", "list"])
def test_inputs_in_another_order_than_targets_are_an_error(kind):
    batch = {"x": INPUTS.clone(), "y": LABELS, "z": SAMPLES["tensors"]()}
    picked, record = pick(batch)
    if kind == "copied":
        picked["x"] = picked["x"].flip(0)
    elif kind == "in place":
        picked["x"].copy_(picked["x"].flip(0))
    else:
        picked["z"] = picked["z"][::-1]
    with pytest.raises(ContradictionError, match="no longer belong together"):
        record.rows_now(picked)


def test_labels_that_are_changed_to_each_others_are_no_contradiction():
    picked, record = pick((INPUTS, LABELS))
    assert record.rows_now((picked[0].flip(0), (picked[1].flip(0) + 1) % 3)).tolist() == [5, 4, 3, 2, 1, 0]


def test_what_nothing_tells_is_an_error():
    picked, record = pick((INPUTS, LABELS))
    with pytest.raises(ValueError, match="List that algorithm so that it runs before"):
        record.rows_now((picked[0] * 2, picked[1] + 10))


@pytest.mark.parametrize("method", ["rows_now", "weights_now"])
def test_repeated_labels_alone_do_not_tell(method):
    picked, record = pick((INPUTS, LABELS))
    batch = (picked[0].flip(0) * 2, picked[1].flip(0))
    with pytest.raises(ValueError, match="Cannot tell which"):
        getattr(record, method)(batch, *([WEIGHTS] if method == "weights_now" else []))


def test_labels_tell_enough_where_weights_are_alike():
    picked, record = pick((INPUTS, LABELS))
    assert record.weights_now((picked[0].flip(0) * 2, picked[1].flip(0)), torch.ones(N)).tolist() == [1.0] * N


def test_a_tensor_of_as_many_rows_as_picks_takes_no_part():
    batch = {"classes": torch.arange(N), "x": INPUTS, "y": LABELS}
    picked, record = pick(batch)
    parts = [{**picked, "x": picked["x"][i : i + 2], "y": picked["y"][i : i + 2]} for i in range(0, N, 2)]
    assert torch.cat([record.weights_of(part, WEIGHTS) for part in parts]).tolist() == WEIGHTS.tolist()


def test_a_forward_pass_that_changes_its_microbatch_leaves_the_next_one_known():
    picked, record = pick((INPUTS, LABELS))
    for i in range(0, N, 2):
        part = take_samples(picked, slice(i, i + 2), N)
        part[0].sub_(1.0)
        part[1].add_(1)
        assert record.weights_of(part, WEIGHTS).tolist() == WEIGHTS[i : i + 2].tolist()


def test_a_record_is_brought_up_to_date():
    picked, record = pick([INPUTS, LABELS])
    picked[0] = picked[0][[3, 1]] * 2
    picked[1] = picked[1][[3, 1]]
    now = record.updated(picked)
    assert now.weights_of((picked[0][1:], picked[1][1:]), torch.tensor([4.0, 8.0])).tolist() == [8.0]


def test_weights_of_another_number_of_rows_are_an_error():
    picked, record = pick((INPUTS, LABELS))
    with pytest.raises(ValueError, match="Cannot tell which"):
        record.weights_of(picked, WEIGHTS[:2])


@pytest.mark.parametrize("kind", ["tensors", "dicts", "arrays", "strings", "numbers"])
def test_a_record_keeps_what_was_when_containers_change(kind):
    picked, record = pick({"x": INPUTS, "y": SAMPLES[kind]()})
    kept = list(map(id, picked["y"]))
    picked["y"].clear()
    picked.clear()
    assert list(map(id, record.leaves["y"])) == kept


@pytest.mark.parametrize("kind", ["tensors", "dicts", "scalar tensors"])
def test_what_is_untouched_is_not_compared(kind, monkeypatch):
    def fail(*_):
        raise AssertionError("contents were compared")

    picked, record = pick((INPUTS, LABELS, SAMPLES[kind]()))
    monkeypatch.setattr(picked_rows, "codes_of_tensors", fail)
    monkeypatch.setattr(picked_rows, "codes_of_objects", fail)
    assert record.rows_now(picked).tolist() == list(range(N))
    assert record.weights_of(take_samples(picked, slice(2, 4), N), WEIGHTS).tolist() == WEIGHTS[2:4].tolist()


def test_tensors_left_whole_in_a_microbatch_are_named():
    whole = {"x": torch.randn(6, 3), "w": torch.rand(6)}
    kept = RowRecord.of(whole, 6, sample_names(whole, 6))
    assert kept.names_left_whole({"x": whole["x"][:2], "w": whole["w"]}) == {"w"}
    assert kept.names_left_whole({"x": whole["x"][:2], "w": whole["w"][:2]}) == set()
    assert kept.names_left_whole(whole) == set()
    assert "w" in names_by_length({"x": whole["x"][:4], "w": whole["w"]}, 4)


def test_weights_of_what_is_unchanged_are_returned_as_they_are():
    picked, record = pick((INPUTS, LABELS))
    assert record.weights_now(picked, WEIGHTS) is WEIGHTS


@given(order=st.permutations(range(N)), hidden=st.integers(0, 2))
def test_cut_out_inputs_are_no_evidence_of_an_order(order, hidden):
    picked, record = pick((INPUTS, torch.arange(M), [str(i) for i in range(M)]))
    now = reordered(picked, order)
    now[0][:, hidden] = 0.0
    assert record.rows_now(now).tolist() == list(order)


@given(values=st.lists(st.integers(0, 2), min_size=M, max_size=M), order=st.permutations(range(N)))
def test_reordered_duplicates_share_their_weight_and_keep_the_sum(values, order):
    x = torch.tensor(values) * 1.0
    picked, record = pick((x, x.long()))
    now = reordered(picked, order)
    weights = record.weights_now(now, WEIGHTS)
    means = [float(WEIGHTS[picked[0] == value].mean()) for value in now[0]]
    assert weights.tolist() == pytest.approx(means)
    assert float((weights * now[0]).sum()) == pytest.approx(float((WEIGHTS * picked[0]).sum()))


def test_picks_and_original_that_were_both_changed_in_place_tell_nothing():
    batch = (INPUTS.clone(), torch.arange(M))
    picked, record = pick(batch)
    for leaf in (*batch, *picked):
        leaf.mul_(3)
    with pytest.raises(ValueError, match="Cannot tell which"):
        record.rows_now(picked)
