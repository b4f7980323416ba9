"""The data sets by name: a new one is a file beside this one and a row here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from composer_gradmatch.data.cifar import cifar10, cifar100
from composer_gradmatch.data.digits import digits
from composer_gradmatch.data.imagenet32 import imagenet32
from composer_gradmatch.data.imdb import imdb
from composer_gradmatch.data.imdb25k import imdb25k
from composer_gradmatch.data.mnist5k import mnist5k
from composer_gradmatch.data.svhn import svhn
from composer_gradmatch.data.synthetic import synthetic

__all__ = ["DATA_SETS", "SHAPES"]

#: Name → a function of the split and options, and for images of one size their shape and the number of classes.
_ROWS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], int] | None]] = {
    "cifar10": (cifar10, ((3, 32, 32), 10)),
    "cifar100": (cifar100, ((3, 32, 32), 100)),
    "digits": (digits, ((1, 8, 8), 10)),
    "imagenet32": (imagenet32, ((3, 32, 32), 1000)),
    "imdb": (imdb, None),
    "imdb25k": (imdb25k, None),
    "mnist5k": (mnist5k, ((1, 28, 28), 10)),
    "svhn": (svhn, ((3, 32, 32), 10)),
    "synthetic": (synthetic, None),
}
#: Name → factory.
DATA_SETS: dict[str, Callable[..., Any]] = {name: factory for name, (factory, _) in _ROWS.items()}
#: Image data set → shape of a sample's input, number of classes.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {name: shape for name, (_, shape) in _ROWS.items() if shape}
