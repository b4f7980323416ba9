"""Label noise: the labels of a random part of a data set, drawn anew (§5.2 of the paper)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from composer.utils.batch_helpers import batch_get, batch_set
from torch.utils.data import Dataset, TensorDataset

__all__ = ["NoisyLabels", "labels_of"]


class NoisyLabels(Dataset):
    """A data set of which ``round(fraction·N)`` samples, drawn at random, have a label drawn at random.

    The new labels are uniform over the classes that occur, so one in C of them is the old one. Which samples
    are noisy depends on the seed (and N) alone; those of a smaller fraction are among those of a larger one.

    Args:
        dataset (Dataset): Samples (input, label) or dicts; map-style. Its labels are taken from its ``targets`` or
            ``labels`` if it has them, else each of its samples is read once.
        fraction (float): The share of noisy samples, in [0, 1].
        seed (int): Of the draws.
        target_key (int | str, optional): Where a sample has its label. None means ``"labels"`` of a dict and 1 of
            anything else. Default: ``None``.

    Attributes:
        noisy_indices (np.ndarray): The noisy samples, int64, in increasing order.
        wrong_indices (np.ndarray): Those of them whose drawn label is another than their own.
        original_labels (np.ndarray): The labels without noise, shape (N,).
        noisy_labels (np.ndarray): The labels with it, shape (N,).

    Raises:
        ValueError: If ``fraction`` is out of range or labels are not one integer a sample.
    """

    def __init__(self, dataset: Any, fraction: float, seed: int, target_key: int | str | None = None) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"label_noise.fraction must be in [0, 1], the share of noisy labels; got {fraction}.")
        labels = labels_of(dataset, target_key)
        classes = np.unique(labels)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(labels))
        drawn = rng.integers(len(classes), size=len(labels))
        self.dataset, self.target_key = dataset, target_key
        self.noisy_indices = np.sort(order[: round(fraction * len(labels))])
        self.wrong_indices = self.noisy_indices[classes[drawn[self.noisy_indices]] != labels[self.noisy_indices]]
        self.original_labels, self.noisy_labels = labels, labels.copy()
        self.noisy_labels[self.noisy_indices] = classes[drawn[self.noisy_indices]]
        self._noisy = {int(i): int(classes[drawn[i]]) for i in self.noisy_indices}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if (label := self._noisy.get(int(index))) is None:
            return sample
        old = _label(sample, self.target_key)
        new = torch.full_like(old, label) if isinstance(old, torch.Tensor) else type(old)(label)
        # A dict would be changed in place, and with it, perhaps, what the data set holds.
        own = dict(sample) if isinstance(sample, dict) else sample
        return batch_set(own, _key(sample, self.target_key), new)


def _key(sample: Any, target_key: int | str | None) -> int | str:
    if target_key is not None:
        return target_key
    return "labels" if isinstance(sample, dict) else 1


def _label(sample: Any, target_key: int | str | None) -> Any:
    key = _key(sample, target_key)
    try:
        return batch_get(sample, key)
    except (LookupError, TypeError, AttributeError) as error:
        held = f"a dict of {', '.join(map(str, sample))}" if isinstance(sample, dict) else type(sample).__name__
        raise ValueError(
            f"label_noise finds no label {key!r} in a sample ({held}). Set label_noise.target_key to where a sample "
            "has its label."
        ) from error


def labels_of(dataset: Any, target_key: int | str | None = None) -> np.ndarray:
    """Gives the labels of a data set: see :class:`NoisyLabels`.

    Args:
        dataset (Dataset): Map-style.
        target_key (int | str, optional): Where a sample has its label. Default: ``None``.

    Returns:
        np.ndarray: Integers, shape (N,).

    Raises:
        ValueError: If labels are not one integer a sample.
    """
    found: Any
    if isinstance(dataset, TensorDataset) and not isinstance(target_key, str):
        found = dataset.tensors[1 if target_key is None else target_key]
    else:
        found = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if found is None:
            found = [_label(dataset[i], target_key) for i in range(len(dataset))]
    labels = np.asarray(found)
    if labels.shape != (len(dataset),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"label_noise needs one integer label a sample, got {labels.dtype} of shape {labels.shape} for "
            f"{len(dataset)} samples. Set label_noise.target_key to where a sample has its label."
        )
    return labels
