"""Ranking samples by a score each: what the rules that take the largest have in common."""

from __future__ import annotations

import torch

from composer_gradmatch.rules.picks import Picks, WholeBatch

__all__ = ["at_most", "by_descending", "check_num_picks", "filled_up", "largest", "per_sample_norms"]


def check_num_picks(m: int, num_samples: int) -> None:
    """Raises unless m samples can be picked of M.

    Raises:
        ValueError: If m is not in 1 to M.
    """
    if not 1 <= m <= num_samples:
        raise ValueError(f"m must be between 1 and the number of samples, {num_samples}; got {m}.")


def at_most(picks: torch.Tensor, m: int) -> torch.Tensor:
    """Draws m of picks at random, with torch's generator, where there are more; else gives all of them.

    Args:
        picks (torch.Tensor): int64, shape (n,), on the CPU.
        m (int): The most.

    Returns:
        torch.Tensor: int64, shape (min(n, m),).
    """
    return picks[torch.randperm(len(picks))[:m]] if len(picks) > m else picks


def by_descending(scores: torch.Tensor) -> torch.Tensor:
    """Ranks samples, the largest score first; equal ones in an order drawn with torch's generator.

    Args:
        scores (torch.Tensor): Shape (M,).

    Returns:
        torch.Tensor: Indices, int64, shape (M,), on the CPU.
    """
    scores = scores.to("cpu", torch.float64)
    shuffled = torch.randperm(len(scores))
    return shuffled[scores[shuffled].argsort(descending=True, stable=True)]


def filled_up(picks: torch.Tensor, m: int, num_samples: int) -> torch.Tensor:
    """Adds samples at random to picks, with torch's generator, until there are m.

    Args:
        picks (torch.Tensor): int64, shape (n,), n ≤ m, on the CPU.
        m (int): Their number, at most M.
        num_samples (int): M.

    Returns:
        torch.Tensor: int64, shape (m,), the given picks first.
    """
    if len(picks) == m:
        return picks
    others = torch.ones(num_samples, dtype=torch.bool)
    others[picks] = False
    rest = others.nonzero()[:, 0]
    return torch.cat([picks, rest[torch.randperm(len(rest))[: m - len(picks)]]])


def largest(scores: torch.Tensor, m: int) -> Picks | WholeBatch:
    """Picks the m samples of the largest scores; nothing can be picked by scores that are all zero.

    Args:
        scores (torch.Tensor): Shape (M,).
        m (int): The number of picks.

    Raises:
        ValueError: If m is out of range.
    """
    check_num_picks(m, len(scores))
    return Picks(by_descending(scores)[:m]) if bool(scores.any()) else WholeBatch()


def per_sample_norms(rows: torch.Tensor, num_samples: int, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Computes the norm of each sample's rows.

    Args:
        rows (torch.Tensor): Shape (M, C); with ``counts`` (N, C), sample by sample.
        num_samples (int): M.
        counts (torch.Tensor, optional): Each sample's number of rows, shape (M,). Default: ``None``, for one.

    Returns:
        torch.Tensor: Shape (M,), float64.
    """
    squares = rows.double().square().sum(1)
    if counts is not None:
        samples = torch.arange(num_samples, device=rows.device).repeat_interleave(counts.to(rows.device))
        squares = squares.new_zeros(num_samples).index_add_(0, samples, squares)
    return squares.sqrt()
