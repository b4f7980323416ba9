"""Facility location: the samples that are nearest to all others' gradients, weighted by how many they stand for."""

from __future__ import annotations

import heapq

import numpy as np
import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.rules.scores import check_num_picks

__all__ = ["facility_location", "gradient_distances", "lazy_greedy"]

#: Squared distances below this share of the gradients' squared norms are rounding.
_ROUNDING = 1e-12


def gradient_distances(gram: np.ndarray) -> np.ndarray:
    """Computes the distances ‖gᵢ − gⱼ‖ from K; those that may be rounding alone are zero.

    Args:
        gram (np.ndarray): K, float64, shape (M, M).

    Returns:
        np.ndarray: Shape (M, M).
    """
    norms = gram.diagonal()[:, None] + gram.diagonal()
    squares = norms - 2 * gram
    return np.sqrt(np.where(squares > _ROUNDING * norms, squares, 0))


def lazy_greedy(distances: np.ndarray, m: int) -> list[int]:
    """Picks samples one after the other, each of which shortens the distances to the nearest pick the most.

    A sample's gain can only fall with each pick, so that one whose gain of now is above all others' gains of before is
    the best (Minoux, 1978): the others' are not computed again. Of equal gains the first sample's counts.

    Args:
        distances (np.ndarray): Shape (M, M), symmetric.
        m (int): The largest number of picks, at least 1.

    Returns:
        list[int]: At most m picks, in that order: fewer where no other sample is at a distance from all picks.
    """
    picks = [int(distances.sum(0).argmin())]
    nearest = distances[picks[0]].copy()
    gains = [(-gain, j, 1) for j, gain in enumerate(np.maximum(nearest - distances, 0).sum(1)) if j != picks[0]]
    heapq.heapify(gains)  # Of (−gain, sample, number of picks at which it was computed).
    while gains and len(picks) < m:
        gain, j, computed = heapq.heappop(gains)
        if gain >= 0:
            break
        if computed == len(picks):
            picks.append(j)
            np.minimum(nearest, distances[j], out=nearest)
        else:
            heapq.heappush(gains, (-np.maximum(nearest - distances[j], 0).sum(), j, len(picks)))
    return picks


def facility_location(candidates: Candidates, m: int) -> Picks | WholeBatch:
    """Picks medoids of the samples' gradients, weighted by the sizes of their clusters.

    CRAIG's selection (Mirzasoleiman et al., 2020, Algorithm 1), of a minibatch by last-layer gradients as in CREST
    (Yang et al., 2023) and CoLM (Nguyen et al., 2025): greedily the picks S that make Σᵢ minⱼ ‖gᵢ − gⱼ‖ small, j in S.
    That is facility location with the similarity of the largest distance less ‖gᵢ − gⱼ‖, whose sum over the samples is
    at least 1 − 1/e of the best (Nemhauser et al., 1978). Weights are the
    numbers of samples that each pick is the nearest to, normalised to sum to the number of picks. The sum bounds how
    far the weighted mean is off. It needs gradients, and costs O(M²(D + C)) for K and at most O(mM²), as a rule about
    O(M²).

    Args:
        candidates (Candidates): With finite gradients.
        m (int): The largest number of picks; fewer where all other samples' gradients are equal to picks'.

    Returns:
        Picks | WholeBatch: The minibatch whole where all gradients are zero.
    """
    check_num_picks(m, candidates.num_samples)
    gram = candidates.gram.to("cpu", torch.float64)
    if not bool(gram.diagonal().any()):
        return WholeBatch()
    distances = gradient_distances(gram.numpy())
    picks = lazy_greedy(distances, m)
    sizes = np.bincount(distances[picks].argmin(0), minlength=len(picks))
    return Picks(torch.tensor(picks), torch.from_numpy(sizes * (len(picks) / candidates.num_samples)))
