"""ResNet-18 for 32×32 images."""

from __future__ import annotations

from functools import partial
from typing import Literal

from composer.models import ComposerClassifier
from torch import nn
from torchvision.models import resnet18

__all__ = ["resnet18_cifar"]


def resnet18_cifar(num_classes: int = 10, norm: Literal["batch", "group"] = "batch") -> ComposerClassifier:
    """Builds torchvision's ResNet-18 with the stem usual for CIFAR: a 3×3 convolution of stride 1 and no pooling.

    11.17 M parameters with ten classes.

    Args:
        num_classes (int, optional): Outputs. Default: ``10``.
        norm (str, optional): ``"batch"`` normalisation, or ``"group"`` in 32 groups, which mixes no samples.
            Default: ``"batch"``.

    Returns:
        ComposerClassifier: For batches (images of shape (M, 3, 32, 32), labels of shape (M,)).

    Raises:
        ValueError: If ``norm`` is neither.
    """
    if norm not in ("batch", "group"):
        raise ValueError(f"norm must be 'batch' or 'group', got {norm!r}.")
    norm_layer = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, 32)
    module = resnet18(num_classes=num_classes, norm_layer=norm_layer)
    module.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    module.maxpool = nn.Identity()  # type: ignore[assignment]
    return ComposerClassifier(module, num_classes=num_classes)
