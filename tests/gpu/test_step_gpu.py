"""The selection step in a Trainer on a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import BATCHNORM, loader, make_trainer

from composer_gradmatch import GradMatch

pytest.importorskip("composer")


class Guarded(GradMatch):
    """Lets no step but the first make the host wait, from the selection forward to the training forward."""

    def _after_dataloader(self, state, logger):
        if state.timestamp.batch > 0:
            torch.cuda.set_sync_debug_mode("error")
        super()._after_dataloader(state, logger)

    def apply(self, event, state, logger):
        super().apply(event, state, logger)
        if event.value == "before_forward":
            torch.cuda.set_sync_debug_mode("default")


def test_the_host_waits_for_nothing_between_the_selection_forward_and_the_training_forward():
    algorithm = Guarded(start=0.0, end=1.0, keep=0.3, interrupt=0)
    train = loader(BATCHNORM.data(80), 20)
    trainer = make_trainer(BATCHNORM.model(), train, [algorithm], device="gpu", max_duration="1ep")
    try:
        trainer.fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.timestamp.batch == 4
