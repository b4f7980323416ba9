"""From a YAML config to ``Trainer.fit``, by ``python -m composer_gradmatch.train`` and from Python."""

from composer_gradmatch.train.command import main
from composer_gradmatch.train.schema import check_config
from composer_gradmatch.train.trainer import build_trainer, train

__all__ = ["build_trainer", "check_config", "main", "train"]
