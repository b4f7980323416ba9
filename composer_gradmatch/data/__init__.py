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
from composer_gradmatch.data.table import DATA_SETS, SHAPES
from composer_gradmatch.data.validation import validation_part

__all__ = [
    "DATA_SETS",
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
    "validation_part",
]
