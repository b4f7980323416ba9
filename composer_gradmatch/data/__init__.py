"""Data sets, a file each: a function of the split and options that returns a torch data set."""

from composer_gradmatch.data.digits import digits
from composer_gradmatch.data.label_noise import NoisyLabels
from composer_gradmatch.data.mnist5k import mnist5k

__all__ = ["SHAPES", "NoisyLabels", "digits", "mnist5k"]

#: Data set → shape of a sample's input, number of classes.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "digits": ((1, 8, 8), 10),
    "mnist5k": ((1, 28, 28), 10),
}
