"""What the image data sets share: transforms, and loading or downloading by torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from composer.utils import dist
from torch.utils.data import Dataset
from torchvision import transforms

from composer_gradmatch.data.split import check_split

__all__ = ["image_transform", "load_torchvision"]

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def image_transform(split: str, statistics: Statistics | None, augment: bool) -> Callable[[Any], Any]:
    """Turns a PIL image into a float32 tensor.

    Args:
        split (str): ``"train"`` or ``"test"``; checked.
        statistics (tuple, optional): Mean and standard deviation of the channels to standardise by; None leaves
            the values in [0, 1].
        augment (bool): Whether to crop at random after padding by 4, and to flip at random.

    Raises:
        ValueError: If ``split`` is neither.
    """
    check_split(split)
    steps: list[Any] = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augment else []
    steps.append(transforms.ToTensor())
    if statistics is not None:
        steps.append(transforms.Normalize(*statistics))
    return transforms.Compose(steps)


def load_torchvision(build: Callable[[bool], Dataset], path: str, download: bool) -> Dataset:
    """Builds a torchvision data set; the first process of each machine downloads, the others wait for it.

    Args:
        build (Callable): A function of whether to download.
        path (str): What must be on disk, for the message.
        download (bool): Whether to download what is missing.

    Raises:
        FileNotFoundError: If the data are missing and ``download`` is false.
    """
    if download:
        with dist.run_local_rank_zero_first():
            return build(dist.get_local_rank() == 0)
    try:
        return build(False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"The data set is not at {path} ({str(error).split('.')[0]}). Put it there, set dataset.root to the folder "
            "that holds it, or set dataset.download=true."
        ) from error
