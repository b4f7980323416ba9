"""Checkpoints that version 0.1.0 has saved in the middle of an epoch: training goes on as it did there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import make_trainer
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_gradmatch import GradMatch, LossBackprop, RandomBackprop, select_first

SAVED = Path(__file__).with_name("version_0_1_0")
ON = {"start": 0.0, "end": 1.0, "interrupt": 0, "keep": 0.3}
ALGORITHMS = {
    "gradmatch": lambda: GradMatch(**ON),
    "loss_backprop": lambda: LossBackprop(history=30, **ON),
    "random_backprop": lambda: RandomBackprop(**ON),
}


def training(name):
    torch.manual_seed(0)
    model = ComposerClassifier(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), num_classes=3)
    inputs = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
    train = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=20)
    algorithm = ALGORITHMS[name]()
    trainer = make_trainer(
        model,
        train,
        [algorithm],
        lr=0.1,
        algorithm_passes=[select_first],
        max_duration="2ep",
        seed=7,
        load_path=str(SAVED / f"{name}.pt"),
    )
    return model, algorithm, trainer


@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_goes_on_as_in_the_version_that_saved_them(name):
    model, _, trainer = training(name)
    assert int(trainer.state.timestamp.batch) == 6
    trainer.fit()
    assert int(trainer.state.timestamp.batch) == 8
    for key, value in torch.load(SAVED / f"{name}-final.pt", weights_only=True).items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_the_recent_losses_are_ranked_by_again():
    _, algorithm, _ = training("loss_backprop")
    saved = torch.load(SAVED / "loss_backprop.pt", weights_only=False)["state"]["algorithms"][0][1]
    assert torch.equal(algorithm.rule.function.recent, saved["recent_losses"][0])
    assert len(algorithm.rule.function.recent) == 30
