"""The samples with the largest gradients."""

from __future__ import annotations

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.rules.scores import largest

__all__ = ["grand"]


def grand(candidates: Candidates, m: int) -> Picks | WholeBatch:
    """Picks the m samples with the largest GraNd scores ‖gᵢ‖ = √Kᵢᵢ (Paul et al., 2021, §2).

    The paper's norms are of all parameters' gradients, the mean over ten networks, and prune a data set once; these are
    the last layer's, of the network that is trained. It needs gradients, and costs O(M²(D + C)) for K.

    Args:
        candidates (Candidates): With finite gradients.
        m (int): The number of picks.

    Returns:
        Picks | WholeBatch: The minibatch whole where all gradients are zero; of equal norms, which is drawn.
    """
    return largest(candidates.gram.diagonal().clamp(min=0).sqrt(), m)
