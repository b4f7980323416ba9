"""The weights that gradients are compared at: at initialisation or a checkpoint, and after epochs of training."""

from __future__ import annotations

from typing import Any

from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger

from composer_gradmatch.studies.strategies import with_strategy
from composer_gradmatch.train import build_trainer

__all__ = ["trained"]


class _StopAfter(Callback):
    """Stops training at the end of an epoch, on the learning rates that the whole of it would have had."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def epoch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.epoch) >= self.epochs:
            state.stop_training()


def trained(config: dict[str, Any], epochs: int, checkpoint: str = "") -> Trainer:
    """Trains on the full batch, by the config's own optimizer and schedule, for its first epochs only.

    Args:
        config (dict[str, Any]): The study's config.
        epochs (int): How many; 0 for none.
        checkpoint (str, optional): Weights to begin with; empty for initial ones. Default: ``""``.

    Returns:
        Trainer: With the model; to be closed by the caller.

    Raises:
        ValueError: If the config's training is over before.
    """
    config = {**with_strategy(config, "full", 1.0), "save_folder": None}
    if checkpoint:
        config |= {"load_path": checkpoint, "load_weights_only": True}
    trainer = build_trainer(config)
    if epochs:
        trainer.state.callbacks.append(_StopAfter(epochs))
        trainer.fit()
        done = int(trainer.state.timestamp.epoch)
        if done < epochs:
            trainer.close()
            raise ValueError(f"--after {epochs}: training was over after {done} epochs. Raise max_duration.")
    return trainer
