"""Data sets, a file each: a function of the split and options that returns a torch data set."""

from composer_gradmatch.data.cifar import cifar10, cifar100
from composer_gradmatch.data.digits import digits
from composer_gradmatch.data.imagenet32 import imagenet32
from composer_gradmatch.data.imdb import imdb
from composer_gradmatch.data.imdb25k import imdb25k
from composer_gradmatch.data.label_noise import NoisyLabels
from composer_gradmatch.data.mnist5k import mnist5k
from composer_gradmatch.data.svhn import svhn
from composer_gradmatch.data.synthetic import synthetic

__all__ = [
    "SHAPES",
    "NoisyLabels",
    "cifar10",
    "cifar100",
    "digits",
    "imagenet32",
    "imdb",
    "imdb25k",
    "mnist5k",
    "svhn",
    "synthetic",
]

#: Image data set → shape of a sample's input, number of classes.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "digits": ((1, 8, 8), 10),
    "imagenet32": ((3, 32, 32), 1000),
    "mnist5k": ((1, 28, 28), 10),
    "svhn": ((3, 32, 32), 10),
}
