"""Downsampled ImageNet, 32×32, in its published format, memory-mapped."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from composer.utils import dist
from PIL import Image
from torch.utils.data import Dataset

from composer_gradmatch.data.split import check_split
from composer_gradmatch.data.vision import image_transform

__all__ = ["ImageNet32", "imagenet32"]

# Mean and standard deviation of ImageNet's channels.
_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_FILES = {"train": [f"train_data_batch_{i}" for i in range(1, 11)], "test": ["val_data"]}


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays and plain values: a pickle could otherwise run any code."""

    _admitted = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy.core.numeric", "_frombuffer"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, where only arrays are expected")
        return super().find_class(module, name)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8, shape (N, 3, 32, 32), and labels from 0, int64, shape (N,), of one published file."""
    try:
        with path.open("rb") as file:
            held = _ArraysOnly(file, encoding="latin1").load()
        images = np.asarray(held["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(held["labels"], dtype=np.int64) - 1
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a file of downsampled ImageNet (a pickle with data, N x 3072, and labels): {error!r}. "
            "Get it again."
        ) from error
    if len(images) != len(labels) or (len(labels) and not 0 <= labels.min() <= labels.max() < 1000):
        raise ValueError(f"{path}: expected a label from 1 to 1000 for each of the {len(images)} images.")
    return images, labels


def _convert(root: Path, split: str) -> None:
    """Joins the published files, one at a time in memory, into two arrays beside them; all or nothing."""
    names = _FILES[split]
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Downsampled ImageNet is not in {root}: {', '.join(missing)} missing. Log in at "
            "https://image-net.org/download-images, get the 32x32 version in its Python (pickle) format, unpack "
            f"{names[0]}{' to ' + names[-1] if len(names) > 1 else ''} there, or set dataset.root to their folder."
        )
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{split}-") as folder:
        labels = []
        raw = Path(folder) / "raw"
        with raw.open("wb") as file:
            for name in names:
                images, own = _read(root / name)
                file.write(images.tobytes())
                labels.append(own)
        joined = np.concatenate(labels)
        mapped = np.memmap(raw, dtype=np.uint8, mode="r", shape=(len(joined), 3, 32, 32))
        np.save(Path(folder) / "images.npy", mapped)
        np.save(Path(folder) / "labels.npy", joined)
        # The images last: their presence says that all is there.
        for kind in ("labels", "images"):
            os.replace(Path(folder) / f"{kind}.npy", root / f"{split}_{kind}.npy")


class ImageNet32(Dataset):
    """Memory-mapped images and their labels.

    Args:
        root (Path): The folder that holds the published files, or what was made of them.
        split (str): ``"train"`` or ``"test"`` (the published validation images).

    Attributes:
        targets (np.ndarray): The labels, int64, shape (N,).
    """

    def __init__(self, root: Path, split: str) -> None:
        self.path = root / f"{split}_images.npy"
        with dist.run_local_rank_zero_first():
            if not self.path.is_file():
                _convert(root, split)
        self.targets = np.load(root / f"{split}_labels.npy")
        self.images = np.load(self.path, mmap_mode="r")
        self._transform = image_transform(split, _STATISTICS, augment=split == "train")

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the images' contents: worker processes map the file themselves."""
        return {**vars(self), "images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.images = np.load(self.path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(np.ascontiguousarray(self.images[index].transpose(1, 2, 0)))
        return self._transform(image), int(self.targets[index])


def imagenet32(split: Literal["train", "test"], root: str = "data/imagenet32") -> ImageNet32:
    """Reads ImageNet at 32×32 (Chrabaszcz et al., 2017): 1,281,167 training and 50,000 test images of 1,000 classes.

    The first use joins the published pickles into two arrays beside them (4 GB for training), which are then
    memory-mapped. Training images are cropped at random after padding by 4 and flipped at random.

    Args:
        split (str): ``"train"``, or ``"test"`` for the published validation images.
        root (str, optional): The folder of ``train_data_batch_1`` to ``_10`` and ``val_data``.
            Default: ``"data/imagenet32"``.

    Returns:
        ImageNet32: Of (image, float32, shape (3, 32, 32), label from 0, int).

    Raises:
        FileNotFoundError: If the published files are not there.
        ValueError: If ``split`` is neither, or a file is not what it should be.
    """
    check_split(split)
    return ImageNet32(Path(root), split)
