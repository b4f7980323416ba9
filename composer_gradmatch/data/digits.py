"""scikit-learn's handwritten digits: 1,797 real 8×8 images of ten classes, embedded in the package."""

from __future__ import annotations

from typing import Literal

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

from composer_gradmatch.data.split import check_split

__all__ = ["digits"]


def digits(split: Literal["train", "test"]) -> TensorDataset:
    """Reads the digits' training or test images, by a fixed stratified split of 80 to 20 %.

    Args:
        split (str): ``"train"`` (1,437 images) or ``"test"`` (360 images).

    Returns:
        TensorDataset: Images, float32 in [0, 1], shape (N, 1, 8, 8), and labels, int64, shape (N,).

    Raises:
        ValueError: If ``split`` is neither.
    """
    check_split(split)
    images, labels = load_digits(return_X_y=True)
    rows = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)[split == "test"]
    inputs = torch.tensor(images[rows] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return TensorDataset(inputs, torch.tensor(labels[rows], dtype=torch.int64))
