"""Wide ResNets for 32×32 images."""

from __future__ import annotations

from composer.models import ComposerClassifier

__all__ = ["wide_resnet"]


def wide_resnet(depth: int, width: int, num_classes: int = 10) -> ComposerClassifier:
    """Builds pytorchcv's WRN-depth-width (Zagoruyko and Komodakis, 2016), without dropout.

    With ten classes WRN-16-4 has 2.75 M parameters and WRN-28-2 has 1.47 M.

    Args:
        depth (int): Layers, 6n + 4 with n residual blocks in each of three groups.
        width (int): The widening factor k: the groups have 16k, 32k and 64k channels.
        num_classes (int, optional): Outputs. Default: ``10``.

    Returns:
        ComposerClassifier: For batches (images of shape (M, 3, 32, 32), labels of shape (M,)).

    Raises:
        ImportError: If pytorchcv is not installed.
        ValueError: If there is no such network.
    """
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, ...) and width positive; got {depth} and {width}.")
    try:
        from pytorchcv.models.wrn_cifar import get_wrn_cifar
    except ImportError as error:
        raise ImportError("wide_resnet needs pytorchcv: pip install 'composer-gradmatch[vision]'.") from error
    module = get_wrn_cifar(num_classes=num_classes, blocks=depth, width_factor=width)
    return ComposerClassifier(module, num_classes=num_classes)
