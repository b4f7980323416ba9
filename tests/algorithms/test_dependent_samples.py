"""Losses and layers that make samples depend on each other, in a run: refused, warned of, or taken as they are."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.models import ComposerModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_gradmatch import GradMatch, LossBackprop, select_first

GENERATOR = torch.Generator().manual_seed(0)
DATA = TensorDataset(
    torch.randn(32, 8, generator=GENERATOR),
    torch.randint(3, (32,), generator=GENERATOR),
    torch.randn(32, generator=GENERATOR) + 3,
)


class Policy(ComposerModel):
    """Advantages are normalised by the batch's, in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch, reduction="mean"):
        advantages = (batch[2] - batch[2].mean()) / batch[2].std()
        losses = advantages * F.cross_entropy(outputs, batch[1], reduction="none")
        return losses if reduction == "none" else losses.mean()


class WithoutStatistics(ComposerModel):
    """Batch normalisation keeps no running statistics."""

    def __init__(self) -> None:
        super().__init__()
        norms = [nn.BatchNorm1d(16, track_running_stats=False) for _ in range(2)]
        self.net = nn.Sequential(
            nn.Linear(8, 16), norms[0], nn.ReLU(), nn.Linear(16, 16), norms[1], nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, batch[1], reduction=reduction)


def train(model, algorithm):
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(DATA, batch_size=16),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration="2ba",
        algorithms=[algorithm],
        algorithm_passes=[select_first],
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()


def test_gradmatch_refuses_advantages_that_are_normalised_in_the_loss():
    with pytest.raises(ValueError, match="depends on which other samples are in the batch"):
        train(Policy(), GradMatch(start=0, end=1, keep=0.3, interrupt=0))


@pytest.mark.parametrize("kind", [GradMatch, LossBackprop])
def test_batch_norm_without_running_statistics_is_taken(kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(GradMatch|LossBackprop): ")
        train(WithoutStatistics(), kind(start=0, end=1, keep=0.3, interrupt=0))
