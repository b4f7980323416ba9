"""SVHN: house numbers, as Wide ResNets are trained on them."""

from __future__ import annotations

from typing import Literal

from torch.utils.data import Dataset
from torchvision import datasets

from composer_gradmatch.data.vision import image_transform, load_torchvision

__all__ = ["svhn"]


def svhn(split: Literal["train", "test"], root: str = "data", download: bool = False) -> Dataset:
    """Reads SVHN's cropped digits: 73,257 training and 26,032 test images of ten classes.

    As in Zagoruyko and Komodakis (2016), pixels are divided by 255 and nothing else is done to the images.

    Args:
        split (str): ``"train"`` or ``"test"``.
        root (str, optional): The folder that holds, or gets, ``train_32x32.mat`` and ``test_32x32.mat``.
            Default: ``"data"``.
        download (bool, optional): Whether to download what is missing. Default: ``False``.

    Returns:
        Dataset: Of (image, float32 in [0, 1], shape (3, 32, 32), label, int).

    Raises:
        FileNotFoundError: If the data are not there.
        ValueError: If ``split`` is neither.
    """
    transform = image_transform(split, None, augment=False)
    return load_torchvision(
        lambda fetch: datasets.SVHN(root, split=split, transform=transform, download=fetch),
        f"{root}/{split}_32x32.mat",
        download,
    )
