"""Samples as images and texts, out of batches of every kind."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from composer_gradmatch.batches import sample_names
from composer_gradmatch.batches.viewable import view_samples

M = 5
LABELS = torch.arange(M)
RGB, GREY = torch.rand(M, 3, 6, 7), torch.rand(M, 6, 7)
RGB_LAST = RGB.permute(0, 2, 3, 1).numpy()
TOKENS = torch.arange(10, 10 + M * 4).reshape(M, 4)
WORDS = [f"sample {i}" for i in range(M)]


def view(batch, num_samples=M, **arguments):
    return view_samples(batch, sample_names(batch, num_samples), **arguments)


def spell(numbers):
    return "-".join(map(str, numbers))


SPELLED = ["-".join(str(10 + 4 * i + j) for j in range(4)) for i in range(M)]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((RGB, LABELS), RGB_LAST),
        ((RGB.to(memory_format=torch.channels_last), LABELS), RGB_LAST),
        ((RGB.permute(0, 2, 3, 1), LABELS), RGB_LAST),
        ([RGB.numpy(), LABELS.numpy()], RGB_LAST),
        ((GREY, LABELS), GREY.numpy()),
        ((GREY[:, None], LABELS), GREY.numpy()),
        (((GREY * 255).byte(), LABELS), (GREY * 255).byte().numpy()),
        ((RGB.bfloat16(), LABELS), RGB_LAST.round(2)),
        ((torch.cat([RGB, RGB[:, :1]], 1), LABELS), RGB_LAST),
        ({"y": LABELS, "x": RGB}, RGB_LAST),
        (UserDict(pixel_values=RGB, labels=LABELS), RGB_LAST),
        (SimpleNamespace(image=RGB, label=LABELS), RGB_LAST),
        (([GREY, RGB], LABELS), GREY.numpy()),
        (([*RGB], LABELS), RGB_LAST),
        (RGB, RGB_LAST),
        ([(row, int(label)) for row, label in zip(RGB, LABELS, strict=True)], RGB_LAST),
        ([{"name": "a", "x": row, "y": 1} for row in RGB], RGB_LAST),
        (([Image.fromarray((row * 255).astype(np.uint8)) for row in RGB_LAST], LABELS), (RGB_LAST * 255).astype(int)),
    ],
)
def test_images(batch, expected):
    seen = view(batch)
    assert len(seen) == M
    for one, other in zip(seen, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.01)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_images_of_many_sizes():
    images = [torch.rand(3, 4 + i, 5) for i in range(M)]
    for inputs in (images, torch.nested.nested_tensor(images)):
        seen = view((inputs, LABELS))
        assert [each.shape for each in seen] == [(4 + i, 5, 3) for i in range(M)]
        np.testing.assert_array_equal(seen[2][..., 1], images[2][1])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"attention_mask": torch.ones_like(TOKENS), "input_ids": TOKENS, "labels": LABELS}, SPELLED),
        ((TOKENS, LABELS), SPELLED),
        ((TOKENS.int().numpy(), LABELS), SPELLED),
        ((TOKENS.tolist(), LABELS), SPELLED),
        ({"labels": LABELS, "input_ids": torch.stack([TOKENS, TOKENS], 1)}, [f"{each} / {each}" for each in SPELLED]),
        ((torch.cat([TOKENS, torch.full((M, 2), -100)], 1), LABELS), SPELLED),
        ((WORDS, LABELS), WORDS),
        (WORDS, WORDS),
        ({"text": WORDS, "label": LABELS}, WORDS),
        ((np.array(WORDS), LABELS), WORDS),
        (([each.encode() for each in WORDS], LABELS), WORDS),
        ([(word, 1) for word in WORDS], WORDS),
        ((pd.Series(WORDS), LABELS), WORDS),
        ((pd.DataFrame({"rating": range(M), "review": WORDS}), LABELS), WORDS),
    ],
)
def test_texts(batch, expected):
    assert view(batch, decode=spell) == expected


def test_a_key_says_where_the_inputs_are():
    batch = {"a": GREY, "b": RGB, "y": LABELS}
    assert view(batch)[0].shape == (6, 7)
    assert view(batch, input_key="b")[0].shape == (6, 7, 3)
    getter = (lambda batch: batch["a"] + 1, lambda batch, value: batch)
    np.testing.assert_array_equal(view(batch, input_key=getter)[1], GREY[1] + 1)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((torch.rand(M, 12), LABELS), r"found 0 float32 of shape \(5, 12\) \(input_key=0\)"),
        ((torch.rand(M, 5, 8, 8), LABELS), r"float32 of shape \(5, 5, 8, 8\)"),
        ((TOKENS, LABELS), r"int64 of shape \(5, 4\).*token numbers with a tokenizer"),
        ({"x": torch.rand(M, 3), "y": LABELS}, r"found x float32 of shape \(5, 3\), y int64 of shape \(5,\)"),
        ((torch.rand(M, 3, 8, 8, 8), LABELS), r"\(5, 3, 8, 8, 8\)"),
        (torch.rand(M, 4), r"the batch float32 of shape \(5, 4\)"),
        (([None] * M, LABELS), "a list of NoneType"),
    ],
)
def test_what_is_neither_is_told_with_what_was_found(batch, found):
    with pytest.raises(ValueError, match=f"neither images nor texts: .*{found}"):
        view(batch)


def test_targets_are_not_taken_for_inputs():
    """Masks of a segmentation, whose inputs have channels that cannot be seen."""
    with pytest.raises(ValueError, match=r"found 0 float32 of shape \(5, 7, 6, 6\)"):
        view((torch.rand(M, 7, 6, 6), torch.zeros(M, 6, 6, dtype=torch.int64)))
