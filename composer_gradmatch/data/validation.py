"""A validation part of a training set: for choices that the test set must not see."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset, Subset

__all__ = ["validation_part"]


def validation_part(
    dataset: Dataset, fraction: float, seed: int, part: Literal["train", "validation"] = "train"
) -> Subset:
    """Gives one of the two parts that a training set falls into at random: to train on, or to validate on.

    Which samples are in which part depends on the seed, the fraction and N alone. Samples are as the training set
    gives them, with its augmentation, if it has one.

    Args:
        dataset (Dataset): N samples; map-style.
        fraction (float): The share of validation samples, in (0, 1): ``round(fraction·N)`` of them.
        seed (int): Of the draw.
        part (str, optional): ``"train"`` or ``"validation"``. Default: ``"train"``.

    Returns:
        Subset: Of the part's samples, in the order of the data set.

    Raises:
        ValueError: If a value is out of range, a part would be empty, or the data set has no length.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation.fraction must be in (0, 1), the share of samples split off; got {fraction}.")
    if part not in ("train", "validation"):
        raise ValueError(f"validation.part must be 'train' or 'validation', got {part!r}.")
    sized: Any = dataset
    if not hasattr(sized, "__len__"):
        raise ValueError("validation needs a data set with a length and samples by index; this one is a stream.")
    split = round(fraction * len(sized))
    if not 0 < split < len(sized):
        raise ValueError(
            f"validation.fraction={fraction} of {len(sized)} samples leaves {split} to validate on and "
            f"{len(sized) - split} to train on. Choose one that leaves some of both."
        )
    order = np.random.default_rng(seed).permutation(len(sized))
    chosen = order[:split] if part == "validation" else order[split:]
    return Subset(dataset, np.sort(chosen).tolist())
