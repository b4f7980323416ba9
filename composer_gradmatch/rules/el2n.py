"""The samples whose outputs are furthest from their targets."""

from __future__ import annotations

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.rules.scores import largest, per_sample_norms

__all__ = ["el2n"]


def el2n(candidates: Candidates, m: int) -> Picks | WholeBatch:
    """Picks the m samples with the largest EL2N scores ‖pᵢ‖ (Paul et al., 2021, §2).

    For cross-entropy pᵢ, the loss's gradient at the outputs, is the error vector softmax(outputs) − y; where the
    output layer runs at positions, the norm is over those of the sample. The paper scores a data set once, by the mean
    over ten networks early in training, to prune it; here the minibatch is scored by the network that is trained. It
    needs gradients, and costs O(MC), C outputs.

    Args:
        candidates (Candidates): With finite gradients.
        m (int): The number of picks.

    Returns:
        Picks | WholeBatch: The minibatch whole where all scores are zero; of equal scores, which is drawn.
    """
    return largest(per_sample_norms(candidates.output_grads, candidates.num_samples, candidates.counts), m)
