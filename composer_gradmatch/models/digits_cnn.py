"""A small convolutional network with BatchNorm for 8×8 images."""

from __future__ import annotations

from composer.models import ComposerClassifier
from torch import nn

__all__ = ["digits_cnn"]


def digits_cnn(num_classes: int = 10, width: int = 32) -> ComposerClassifier:
    """Builds three convolutions with BatchNorm, global average pooling and a linear output layer.

    Args:
        num_classes (int, optional): Outputs. Default: ``10``.
        width (int, optional): Channels of the first convolution; the others have twice as many. Default: ``32``.

    Returns:
        ComposerClassifier: For batches (images of shape (M, 1, 8, 8), labels of shape (M,)).
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    module = nn.Sequential(
        *block(1, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )
    return ComposerClassifier(module, num_classes=num_classes)
