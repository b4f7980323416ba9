"""Training replaced by a function: accuracies at a known offset from the full batch's, at a known cost."""

from __future__ import annotations

from math import log

import numpy as np

from composer_gradmatch.studies.verdict.conduct import conduct
from composer_gradmatch.studies.verdict.ledger import Ledger
from composer_gradmatch.studies.verdict.question import Question
from composer_gradmatch.studies.verdict.trial import FULL, Outcome

EPOCHS = 4
SECONDS = 100.0


class MadeUp:
    """Accuracies of ``offset`` from the full batch's 0.95 at the best rate, paired by the seed.

    Args:
        offsets: Cell → (offset in accuracy, cost in full batches, best learning rate, None where all are alike).
        spread: Standard deviation of a run beside what it shares with the full batch of its seed.
        world: Another draw of everything.
        samples: Accuracies are counted on so many test samples.
    """

    def __init__(self, offsets, spread=0.003, world=0, samples=10_000, fails=()):
        self.offsets = {FULL: (0.0, 1.0, 0.1), **offsets}
        self.spread, self.world, self.samples, self.fails = spread, world, samples, fails
        self.made = []

    def __call__(self, trial):
        self.made.append(trial)
        if trial.cell in self.fails:
            return Outcome((), (), 1.0, "ValueError: as told")
        offset, cost, best = self.offsets[trial.cell]
        shared = np.random.default_rng([self.world, trial.seed]).normal(0, 0.005)
        place = [self.world, trial.seed, sorted(self.offsets).index(trial.cell), int(trial.rate * 1e6)]
        own = np.random.default_rng(place).normal(0, self.spread)
        slope = 0.0 if best is None else abs(log(trial.rate / best))
        last = 0.95 + offset + shared + own - 0.02 * slope - 0.02 * (1 - trial.share)
        last = round(min(last, 1.0) * self.samples) / self.samples
        seconds = SECONDS * cost * trial.share
        steps = [(epoch + 1) / EPOCHS for epoch in range(EPOCHS)]
        return Outcome(tuple(last * step**0.1 for step in steps), tuple(seconds * step for step in steps), seconds)


def ask(training, budget=1e6, margin=0.005, spent=0.0, source=None, tell=None, recorded=None, expect=None, **changes):
    """Conducts a verdict on a made-up training."""
    cells = tuple(cell for cell in training.offsets if cell != FULL)
    question = Question(cells, 0.1, margin, 0.95, training.samples, **changes)
    recorded = recorded or (lambda trial: False)
    guess = lambda cell: training.offsets[cell][1]  # noqa: E731
    ledger = Ledger(source or training, budget, guess, SECONDS, spent, tell, recorded, expect)
    return conduct(question, ledger)
