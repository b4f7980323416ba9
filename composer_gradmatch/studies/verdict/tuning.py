"""Learning rates for a study that is given its seeds: chosen before its runs are planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from composer_gradmatch.studies.configs import learning_rate
from composer_gradmatch.studies.engines.engine import Engine
from composer_gradmatch.studies.store import Store
from composer_gradmatch.studies.strategies import strategy_named
from composer_gradmatch.studies.verdict.halving import PLANS, tune
from composer_gradmatch.studies.verdict.ledger import Ledger
from composer_gradmatch.studies.verdict.progress import Progress
from composer_gradmatch.studies.verdict.question import TUNING_SEEDS
from composer_gradmatch.studies.verdict.runs import TRAINING, runs_of
from composer_gradmatch.studies.verdict.source import Stored, making
from composer_gradmatch.studies.verdict.trial import Cell
from composer_gradmatch.train.config import ConfigError

__all__ = ["Tuning", "tuning_rate"]


def tuning_rate(config: dict[str, Any]) -> float:
    """Gives the learning rate around which others are tried.

    Raises:
        ConfigError: If there is none, or it is zero.
    """
    rate = learning_rate(config)
    if rate <= 0:
        raise ConfigError(f"optimizer.lr: expected a number above 0, around which rates are tried; got {rate:g}.")
    return rate


@dataclass(frozen=True)
class Tuning:
    """The choice of a learning rate for each of several cells, by the most thorough plan.

    Attributes:
        config (dict[str, Any]): The user's.
        cells (Sequence[Cell]): To be tuned.
        metric (str): Its logged name.
        label_noise (float): Of the training labels.
        validation (float): The share of the training set that is split off.
        change (Callable): ``change(config, keep)``: what else is different at a keep.
    """

    config: dict[str, Any]
    cells: Sequence[Cell]
    metric: str
    label_noise: float
    validation: float
    change: Callable[[dict[str, Any], float], dict[str, Any]]

    def rates(self, store: Store, engine: Engine, retry_failed: bool) -> dict[Cell, float]:
        """Chooses the rates, by runs of the kind ``"tuning"`` in the study's folder."""
        rate, plan = tuning_rate(self.config), PLANS[0]
        run_of = runs_of(self.config, "tuning", self.metric, self.label_noise, self.validation, 0, self.change)
        with (
            making(store, engine) as make,
            Progress(None, engine.slots) as progress,
            closing(Stored(store, run_of, lambda run: make(run, TRAINING), retry_failed, engine.slots)) as source,
        ):
            ledger = Ledger(
                source,
                float("inf"),
                lambda cell: strategy_named(cell[0]).cost(cell[1]),
                0.0,
                tell=progress.tell,
                expect=source.expect if engine.slots > 1 else None,
            )
            trials = [trial for cell in self.cells for trial in plan.trials_like(cell, rate, TUNING_SEEDS)]
            sure = [trial for cell in self.cells for trial in plan.first_trials(cell, rate, TUNING_SEEDS)]
            ledger.begin("learning rates", trials, sure)
            return {cell: tune(ledger, plan, cell, rate, TUNING_SEEDS).rate for cell in self.cells}
