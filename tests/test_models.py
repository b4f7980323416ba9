"""The paper's models: depths, widths and parameter counts, by the papers' own arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from composer_gradmatch.builders import build_named
from composer_gradmatch.config import ConfigError
from composer_gradmatch.models import mnist_cnn, resnet18_cifar, wide_resnet


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def wrn_parameters(depth, width, classes):
    """Zagoruyko and Komodakis, Table 1: BatchNorm before each 3×3 convolution, 1×1 where channels change."""
    blocks, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
    total = 3 * 9 * 16
    for group in range(3):
        for block in range(blocks):
            inner, outer = channels[group] if block == 0 else channels[group + 1], channels[group + 1]
            total += 2 * inner + 9 * inner * outer + 2 * outer + 9 * outer * outer
            total += inner * outer if inner != outer else 0
    return total + 2 * channels[3] + (channels[3] + 1) * classes


@pytest.mark.parametrize(
    ("depth", "width", "classes", "millions"), [(16, 4, 10, 2.75), (28, 2, 10, 1.47), (28, 2, 1000, 1.60)]
)
def test_wide_resnets_are_the_papers(depth, width, classes, millions):
    model = wide_resnet(depth, width, classes)
    assert count(model) == wrn_parameters(depth, width, classes)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.005)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) == depth - 3  # The linear layer and, in the paper's count, two of the three projections.
    assert sorted({layer.out_channels for layer in layers}) == sorted({16, 16 * width, 32 * width, 64 * width})
    assert model((torch.randn(2, 3, 32, 32), None)).shape == (2, classes)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(64 * width, classes)]


def test_a_wide_resnet_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="depth must be 6n"):
        wide_resnet(17, 4)
    with pytest.raises(ConfigError, match="model wide_resnet: depth must be 6n"):
        build_named("model", {"name": "wide_resnet", "depth": 17, "width": 4})


def test_resnet18_has_the_cifar_stem():
    model = resnet18_cifar(10)
    # torchvision's 11,689,512 with the 7×7 stem's and the head's parameters exchanged.
    assert count(model) == 11_689_512 - 3 * 64 * 49 + 3 * 64 * 9 - 513 * 1000 + 513 * 10
    assert model((torch.randn(2, 3, 32, 32), None)).shape == (2, 10)
    features = []
    model.module.layer1.register_forward_hook(lambda module, inputs, output: features.append(output.shape))
    model((torch.randn(2, 3, 32, 32), None))
    assert features == [(2, 64, 32, 32)]


def test_mnist_cnn_takes_28_by_28_images():
    assert mnist_cnn()((torch.randn(2, 1, 28, 28), None)).shape == (2, 10)
