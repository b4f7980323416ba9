"""Models that lay their activations out in all sorts of ways, and picks of a minibatch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import Autocast, Encoder
from torch import nn
from torchvision.models import resnet18

from composer_gradmatch.models.wide_resnet import wide_resnet

M, CLASSES = 8, 5


ROWS = torch.tensor([5, 0, 2])


WEIGHTS = torch.tensor([0.5, 2.0, 0.5])


def encoder(batch_first):
    return Encoder(batch_first, width=16, heads=2, layers=2, dropout=0.3)


def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, CLASSES))


def batchnorm(training=True):
    norm = nn.BatchNorm2d(4).train(training)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, CLASSES))


MODELS = {
    "mlp": (mlp, (12,)),
    "bf16": (lambda: Autocast(mlp()), (12,)),
    "encoder, batch first": (lambda: encoder(True), (7, 16)),
    "encoder, positions first": (lambda: encoder(False), (7, 16)),
    "ResNet-18, GroupNorm": (
        lambda: resnet18(num_classes=CLASSES, norm_layer=lambda channels: nn.GroupNorm(8, channels)),
        (3, 32, 32),
    ),
    "ResNet-18, BatchNorm": (lambda: resnet18(num_classes=CLASSES), (3, 32, 32)),
    # In single precision, rounding switches units of its ReLUs on and off.
    "Wide ResNet": (lambda: wide_resnet(10, 1, num_classes=CLASSES).module.double(), (3, 32, 32)),
    "BatchNorm and dropout": (batchnorm, (3, 8, 8)),
    "frozen BatchNorm": (lambda: batchnorm(training=False), (3, 8, 8)),
    "statistics of instances": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(144, CLASSES),
        ),
        (3, 8, 8),
    ),
    "bf16, nearly uniform": (lambda: Autocast(nn.Sequential(NearlyUniform(), nn.Linear(112, CLASSES))), (7, 16)),
    "complex numbers": (lambda: nn.Sequential(nn.Linear(12, 12), Rotated(), nn.Linear(12, CLASSES)), (12,)),
    "rows by index": (lambda: nn.Sequential(nn.Linear(12, CLASSES), LastOf()), (7, 12)),
}


class Rotated(nn.Module):
    """Complex numbers on the way, as in some rotary embeddings."""

    def forward(self, inputs):
        pairs = torch.view_as_complex(inputs.unflatten(-1, (6, 2)))
        return torch.view_as_real(pairs * pairs.abs()).flatten(-2)


class NearlyUniform(nn.Module):
    """Attention at the start of training: in which order its samples are shows in little."""

    def __init__(self):
        super().__init__()
        self.scores, self.values = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, inputs):
        return self.values((0.02 * self.scores(inputs)).softmax(-1)).flatten(1)


class LastOf(nn.Module):
    """Indices of the samples on the way, which the backward pass wants as many of as there are picks."""

    def forward(self, inputs):
        last = inputs[..., 0].argmax(-1)
        return inputs[torch.arange(len(inputs)), last]


def weighted(outputs, targets):
    return (F.cross_entropy(outputs.float(), targets, reduction="none") * WEIGHTS).sum()


def built(name):
    torch.manual_seed(0)
    module, shape = MODELS[name]
    model = module()
    inputs = torch.randn(M, *shape)
    return model, inputs.to(next(model.parameters()).dtype), torch.randint(CLASSES, (M,))


def assert_close(found, expected, tolerance=2e-5):
    flat, reference = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected))
    assert (flat - reference).norm() <= tolerance * reference.norm()
