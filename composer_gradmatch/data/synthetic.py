"""Random tensors in the place of a data set, to time a model without its data."""

from __future__ import annotations

from typing import Literal

import torch
from torch.utils.data import TensorDataset

from composer_gradmatch.data.split import check_split

__all__ = ["synthetic"]


def synthetic(
    input_shape: list[int],
    num_classes: int,
    num_samples: int = 1024,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
) -> TensorDataset:
    """Draws standard normal inputs with uniform labels.

    Args:
        input_shape (list[int]): Of one sample.
        num_classes (int): C.
        num_samples (int, optional): N. Default: ``1024``.
        seed (int, optional): Of the draws. Default: ``0``.
        split (str, optional): ``"train"`` or ``"test"``, which are drawn apart. Default: ``"train"``.

    Returns:
        TensorDataset: Inputs, float32, shape (N, *input_shape), and labels, int64, shape (N,).

    Raises:
        ValueError: If a size is not positive or ``split`` is neither.
    """
    check_split(split)
    if min([num_classes, num_samples, *input_shape]) < 1:
        raise ValueError(
            f"Sizes must be positive, got input_shape={input_shape}, num_classes={num_classes}, "
            f"num_samples={num_samples}."
        )
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    inputs = torch.randn(num_samples, *input_shape, generator=generator)
    return TensorDataset(inputs, torch.randint(num_classes, (num_samples,), generator=generator))
