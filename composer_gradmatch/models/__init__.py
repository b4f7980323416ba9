"""Models, a file each: a function of options that returns a ComposerModel."""

from composer_gradmatch.models.bert import bert
from composer_gradmatch.models.digits_cnn import digits_cnn
from composer_gradmatch.models.mnist_cnn import mnist_cnn
from composer_gradmatch.models.resnet18_cifar import resnet18_cifar
from composer_gradmatch.models.table import MODELS
from composer_gradmatch.models.wide_resnet import wide_resnet

__all__ = ["MODELS", "bert", "digits_cnn", "mnist_cnn", "resnet18_cifar", "wide_resnet"]
