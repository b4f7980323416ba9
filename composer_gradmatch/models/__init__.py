"""Models, a file each: a function of options that returns a ComposerModel."""

from composer_gradmatch.models.digits_cnn import digits_cnn
from composer_gradmatch.models.mnist_cnn import mnist_cnn

__all__ = ["digits_cnn", "mnist_cnn"]
