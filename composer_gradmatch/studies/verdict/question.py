"""What is asked, and how the probability of a wrong answer is divided among all that could be wrong."""

from __future__ import annotations

from dataclasses import dataclass

from composer_gradmatch.studies.verdict.trial import Cell

__all__ = ["TUNING_SEEDS", "Question"]

#: The share of the error that is for an early answer from the headroom.
_EARLY = 0.2
#: Seeds of the learning rates' runs are counted from here: none of them is one that the test set sees.
TUNING_SEEDS = 100_000


@dataclass(frozen=True)
class Question:
    """A verdict's question.

    Attributes:
        cells (tuple[Cell, ...]): The candidates: strategies at keeps, random among them, without the full batch.
        rate (float): The config's learning rate.
        margin (float): How much less accurate than the full batch is as good.
        confidence (float): The probability that nothing that the verdict calls decided is wrong, e.g. 0.95.
        test_samples (int): What accuracies are counted on.
        seed (int, optional): The first one. Default: ``0``.
    """

    cells: tuple[Cell, ...]
    rate: float
    margin: float
    confidence: float
    test_samples: int
    seed: int = 0

    @property
    def randoms(self) -> list[Cell]:
        """Random's cells, the cheapest first."""
        return sorted((cell for cell in self.cells if cell[0] == "random"), key=lambda cell: cell[1])

    @property
    def least_spread(self) -> float:
        """Half a test sample, the least standard deviation of a difference to reckon with."""
        return 0.5 / self.test_samples

    @property
    def early_alpha(self) -> float:
        """The error of each of random's comparisons in the headroom."""
        return _EARLY * (1 - self.confidence) / max(1, len(self.randoms))

    @property
    def comparisons(self) -> int:
        """How many comparisons are made: each candidate with the full batch, each that selects with random."""
        return 2 * len(self.cells) - len(self.randoms)

    @property
    def alpha(self) -> float:
        """The error of each of those comparisons, over all looks: the rest, divided equally (Bonferroni)."""
        return (1 - _EARLY) * (1 - self.confidence) / max(1, self.comparisons)

    @property
    def tuning_seed(self) -> int:
        """The first seed of the learning rates' runs."""
        return self.seed + TUNING_SEEDS
