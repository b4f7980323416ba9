"""KAKURENBO: the surest samples are hidden."""

from __future__ import annotations

import math

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks
from composer_gradmatch.rules.scores import at_most, by_descending, check_num_picks

__all__ = ["Kakurenbo"]


class Kakurenbo:
    """Hides the samples with the lowest losses, but those that the model is not sure of.

    Of the ⌊F·M⌋ lowest losses, those above −log(τ) are moved back: Nguyen et al. (NeurIPS 2023, "KAKURENBO: Adaptively
    Hiding Samples in Deep Neural Network Training", §3.1 and 3.2). The paper moves back what is predicted wrongly or
    with a confidence below τ. Of a cross-entropy, and τ ≥ ½, that is the same: a loss of at most −log(τ) says that the
    label has a probability of at least τ, and is predicted. Of any other loss take ``confidence=None``, which moves
    none back. The number of picks follows from the losses; ``keep`` is its upper bound: where more are left than m, m
    of them are drawn at random; ``keep=1`` is no bound.

    What differs: the paper hides samples of the whole data set for an epoch, by their losses in the last one (here:
    ``refresh``), and looks at the hidden ones at the end of each. It lowers F in the course of training; here it is
    constant, and 0 outside ``start`` and ``end``. It raises the learning rate by 1/(1 − F), since an epoch has as many
    fewer steps; here there are as many steps as before, of fewer samples, and the learning rate is left alone. As in
    the paper, the picks have no weights, so that high losses are favoured. It needs losses, and costs O(M log M).

    Args:
        hide (float, optional): F, the largest share of the minibatch to hide, in [0, 1). Default: ``0.3``.
        confidence (float, optional): τ in [0.5, 1); None to hide whatever has low losses. Default: ``0.7``.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(self, *, hide: float = 0.3, confidence: float | None = 0.7) -> None:
        if not 0 <= hide < 1:
            raise ValueError(f"hide must be in [0, 1), the largest share of the minibatch to hide; got {hide}.")
        if confidence is not None and not 0.5 <= confidence < 1:
            raise ValueError(
                f"confidence must be in [0.5, 1), the least probability of a label that is hidden, or None; got "
                f"{confidence}."
            )
        self.hide, self.confidence = hide, confidence

    def __call__(self, candidates: Candidates, m: int) -> Picks:
        """Picks at most m samples; of equal losses, which is hidden is drawn with torch's generator.

        Args:
            candidates (Candidates): With finite losses.
            m (int): The most picks.

        Returns:
            Picks: Without weights; and the metric ``fraction_left``, the share that is not hidden.

        Raises:
            ValueError: If m is out of range.
        """
        num_samples = candidates.num_samples
        check_num_picks(m, num_samples)
        losses = candidates.losses.to("cpu", torch.float64)
        hidden = by_descending(losses)[num_samples - int(self.hide * num_samples) :]
        if self.confidence is not None:
            hidden = hidden[losses[hidden] <= -math.log(self.confidence)]
        left = torch.ones(num_samples, dtype=torch.bool)
        left[hidden] = False
        indices = left.nonzero()[:, 0]
        return Picks(at_most(indices, m), metrics={"fraction_left": len(indices) / num_samples})
