"""The k-DPP: diverse samples, each set with a probability in proportion to the volume that its gradients span."""

from __future__ import annotations

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.rules.scores import check_num_picks, filled_up

__all__ = ["k_dpp", "log_elementary_polynomials", "sample_k_dpp"]


def log_elementary_polynomials(log_values: torch.Tensor, k: int) -> torch.Tensor:
    """Computes the logarithms of the elementary symmetric polynomials of the first n of N positive values.

    Kulesza and Taskar (2012), Algorithm 7, in logarithms: products of many eigenvalues leave the range of float64.

    Args:
        log_values (torch.Tensor): float64, shape (N,).
        k (int): The largest degree.

    Returns:
        torch.Tensor: Row n, column l: log e_l of the first n values, −∞ for l > n; shape (N + 1, k + 1).
    """
    table = log_values.new_full((len(log_values) + 1, k + 1), -torch.inf)
    table[:, 0] = 0
    for n, value in enumerate(log_values):
        table[n + 1, 1:] = torch.logaddexp(table[n, 1:], value + table[n, :-1])
    return table


def sample_k_dpp(gram: torch.Tensor, k: int) -> torch.Tensor:
    """Draws a set S of k samples with probability det(K_S)/e_k(K's eigenvalues), with torch's generator.

    Kulesza and Taskar (2012), Algorithms 8 and 1: k eigenvectors of K are drawn, then samples from the projection onto
    them, one after the other.

    Args:
        gram (torch.Tensor): K, positive semidefinite, float64, on the CPU, shape (M, M).
        k (int): The number of samples; at most K's rank is drawn.

    Returns:
        torch.Tensor: int64, shape (min(k, rank of K),).
    """
    values, vectors = torch.linalg.eigh(gram)
    positive = values > len(gram) * torch.finfo(gram.dtype).eps * values.abs().max()
    log_values, vectors = values[positive].log(), vectors[:, positive]
    k = min(k, len(log_values))
    table = log_elementary_polynomials(log_values, k)
    chosen: list[int] = []
    for n in range(len(log_values), 0, -1):
        left = k - len(chosen)
        if not left:
            break
        log_probability = log_values[n - 1] + table[n - 1, left - 1] - table[n, left]
        if n == left or bool(torch.rand((), dtype=gram.dtype).log() < log_probability):
            chosen.append(n - 1)
    return _sample_projection(vectors[:, chosen])


def _sample_projection(vectors: torch.Tensor) -> torch.Tensor:
    """Draws from the DPP of the projection onto orthonormal columns, as many samples as there are of these."""
    num_samples, k = vectors.shape
    chances = vectors.square().sum(1)  # ‖·‖² of what each row has beside those of the picks.
    onto = vectors.new_zeros(k, num_samples)
    picks: list[int] = []
    for t in range(k):
        pick = int(torch.multinomial(chances, 1))
        picks.append(pick)
        part = vectors @ vectors[pick] - onto[:t, pick] @ onto[:t]
        onto[t] = part / chances[pick].sqrt()
        chances = (chances - onto[t].square()).clamp(min=0)
        chances[picks] = 0
    return torch.tensor(picks, dtype=torch.int64)


def k_dpp(candidates: Candidates, m: int) -> Picks | WholeBatch:
    """Draws m samples with diverse gradients from the k-DPP of K (Kulesza and Taskar, 2011; Zhang et al., 2017).

    A set's probability is in proportion to det(K_S), the squared volume that its gradients span: long gradients are
    favoured, and ones that are alike do not come together. As in Zhang et al. the picks have no weights. Where K has
    fewer than m positive eigenvalues, no set of m has a volume: as many as these are drawn, and the rest at random.
    It needs gradients, and costs O(M²(D + C)) for K and O(M³) for its eigenvalues; a draw is O(Mm²).

    Args:
        candidates (Candidates): With finite gradients.
        m (int): The number of picks.

    Returns:
        Picks | WholeBatch: The minibatch whole where all gradients are zero.
    """
    check_num_picks(m, candidates.num_samples)
    gram = candidates.gram.to("cpu", torch.float64)
    scale = gram.diagonal().max()
    if not scale > 0:
        return WholeBatch()
    picks = sample_k_dpp(gram / scale, m)
    return Picks(filled_up(picks, m, len(gram)))
