"""CIFAR-10 and CIFAR-100 with the usual augmentation."""

from __future__ import annotations

from typing import Literal

from torch.utils.data import Dataset
from torchvision import datasets

from composer_gradmatch.data.vision import image_transform, load_torchvision

__all__ = ["cifar10", "cifar100"]

# Mean and standard deviation of the training images' channels.
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def cifar10(split: Literal["train", "test"], root: str = "data", download: bool = False) -> Dataset:
    """Reads CIFAR-10: 50,000 training and 10,000 test images of ten classes.

    Training images are cropped at random after padding by 4 and flipped at random; all are standardised.

    Args:
        split (str): ``"train"`` or ``"test"``.
        root (str, optional): The folder that holds, or gets, ``cifar-10-batches-py``. Default: ``"data"``.
        download (bool, optional): Whether to download what is missing. Default: ``False``.

    Returns:
        Dataset: Of (image, float32, shape (3, 32, 32), label, int).

    Raises:
        FileNotFoundError: If the data are not there.
        ValueError: If ``split`` is neither.
    """
    return _cifar(datasets.CIFAR10, _CIFAR10, split, root, download)


def cifar100(split: Literal["train", "test"], root: str = "data", download: bool = False) -> Dataset:
    """Reads CIFAR-100: 50,000 training and 10,000 test images of a hundred classes; otherwise as :func:`cifar10`.

    Args:
        split (str): ``"train"`` or ``"test"``.
        root (str, optional): The folder that holds, or gets, ``cifar-100-python``. Default: ``"data"``.
        download (bool, optional): See :func:`cifar10`. Default: ``False``.

    Returns:
        Dataset: Of (image, float32, shape (3, 32, 32), label, int).
    """
    return _cifar(datasets.CIFAR100, _CIFAR100, split, root, download)


def _cifar(
    kind: type[datasets.CIFAR10],
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    split: str,
    root: str,
    download: bool,
) -> Dataset:
    transform = image_transform(split, statistics, augment=split == "train")
    return load_torchvision(
        lambda fetch: kind(root, train=split == "train", transform=transform, download=fetch),
        f"{root}/{kind.base_folder}",
        download,
    )
