"""The models by name: a new one is a file beside this one and a row here."""

from __future__ import annotations

from collections.abc import Callable

from composer.models import ComposerModel

from composer_gradmatch.models.bert import bert
from composer_gradmatch.models.digits_cnn import digits_cnn
from composer_gradmatch.models.mnist_cnn import mnist_cnn
from composer_gradmatch.models.resnet18_cifar import resnet18_cifar
from composer_gradmatch.models.wide_resnet import wide_resnet

__all__ = ["MODELS"]

#: Name → a function of options.
MODELS: dict[str, Callable[..., ComposerModel]] = {
    "bert": bert,
    "digits_cnn": digits_cnn,
    "mnist_cnn": mnist_cnn,
    "resnet18_cifar": resnet18_cifar,
    "wide_resnet": wide_resnet,
}
