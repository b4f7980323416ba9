"""A small convolutional network with BatchNorm for 28×28 images."""

from __future__ import annotations

from composer.models import ComposerClassifier
from torch import nn

__all__ = ["mnist_cnn"]


def mnist_cnn(num_classes: int = 10, width: int = 16) -> ComposerClassifier:
    """Builds two convolutions with BatchNorm and max-pooling, and a linear output layer on all their features.

    Args:
        num_classes (int, optional): Outputs. Default: ``10``.
        width (int, optional): Channels of the first convolution; the second has twice as many. Default: ``16``.

    Returns:
        ComposerClassifier: For batches (images of shape (M, 1, 28, 28), labels of shape (M,)).
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    module = nn.Sequential(
        *block(1, width), *block(width, 2 * width), nn.Flatten(), nn.Linear(2 * width * 7 * 7, num_classes)
    )
    return ComposerClassifier(module, num_classes=num_classes)
