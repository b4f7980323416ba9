"""The classes of samples, of targets of every kind."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from composer_gradmatch.batches.reader import BatchReader


def got_by(getter):
    return getter, lambda batch, value: batch


X, Y = torch.zeros(4, 3), torch.tensor([2, 0, 2, 5])


@pytest.mark.parametrize(
    ("batch", "key"),
    [
        ((X, Y), 1),
        ([X, Y.to(torch.uint8)], 1),
        ((X, Y[:, None]), 1),
        ((X, Y.numpy().astype(np.uint16)), 1),
        ((X, Y.tolist()), 1),
        ((X, list(Y)), 1),
        ({"x": X, "y": Y}, "y"),
        ({"input_ids": X, "labels": Y}, 1),
        (BatchEncoding({"input_ids": X, "labels": Y}), 1),
        (SimpleNamespace(x=X, y=Y), got_by(lambda batch: batch.y)),
        ((X, torch.nn.functional.one_hot(Y)), got_by(lambda batch: batch[1].argmax(1))),
    ],
)
def test_targets_that_are_classes(batch, key):
    labels = BatchReader(0, key).labels(batch, 4)
    assert (labels.dtype, labels.tolist()) == (torch.int64, Y.tolist())


def test_booleans_are_classes():
    assert BatchReader().labels((X, Y > 0), 4).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("batch", "key", "says"),
    [
        ((X, Y.float()), 1, r"target_key=1 names torch.float32 of shape \(4,\)"),
        ((X, Y.double().tolist()), 1, "float64"),
        ((X, torch.stack([Y, Y], 1)), 1, r"of shape \(4, 2\) for 4 samples"),
        ((X, Y[:3]), 1, r"of shape \(3,\) for 4 samples"),
        ((X, ["a", "b", "c", "d"]), 1, "names a list"),
        ((X, [[1], [1, 2], [3], [4]]), 1, "names a list"),
        ((X, {"boxes": Y}), 1, "names a dict"),
        ((X, [Y, Y]), 1, "names a list"),
        ((X, torch.nested.as_nested_tensor([Y, Y, Y, Y], layout=torch.jagged)), 1, "names a NestedTensor"),
        (X, 1, "the batch is one tensor, which has no targets"),
        ({"x": X}, 1, "target_key=1 names nothing in the batch"),
    ],
)
def test_anything_else_is_refused_with_the_remedy(batch, key, says):
    with pytest.raises(ValueError, match=f"(?s)({says}.*a pair of a getter and a setter|{says})"):
        BatchReader(0, key).labels(batch, 4)
