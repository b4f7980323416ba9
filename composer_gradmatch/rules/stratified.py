"""Stratified selection: of each class as many as its share, drawn at random."""

from __future__ import annotations

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks
from composer_gradmatch.rules.scores import check_num_picks

__all__ = ["allocate", "stratified"]


def allocate(counts: torch.Tensor, m: int) -> torch.Tensor:
    """Shares m picks among classes in proportion to their samples, with torch's generator.

    With quotas q = m·M_c/M, a class of q < 1 gets one pick with probability q, else none: by systematic sampling of
    such classes in an order that is drawn, so that their picks' number is their quotas' sum, rounded down or up. The
    others share the rest: the whole part of q each, and one more for the largest remainders, of equal ones drawn.

    Args:
        counts (torch.Tensor): M_c > 0, int64, shape (C,), with sum M.
        m (int): The number of picks, 1 to M.

    Returns:
        torch.Tensor: n_c ≤ M_c, int64, shape (C,), with sum m.
    """
    total, quotas = int(counts.sum()), m * counts  # Quotas in units of 1/M, since whole numbers round nothing.
    order = torch.randperm(len(counts))
    small = order[quotas[order] < total]
    offset = torch.randint(total, ())
    passed = torch.cat([offset[None], offset + quotas[small].cumsum(0)]) // total
    given = quotas // total
    given[small] = passed.diff()
    large = order[quotas[order] >= total]
    by_remainder = large[(quotas[large] % total).argsort(descending=True, stable=True)]
    given[by_remainder[: m - int(given.sum())]] += 1
    return given


def stratified(candidates: Candidates, m: int) -> Picks:
    """Picks of each class in proportion to its samples in the minibatch, and looks at labels alone.

    The stratified sampling of survey statistics (Cochran, 1977, chapter 5; of minibatches: Zhao and Zhang, 2014). The
    picks of a class are drawn at random without replacement, with weights wᵢ = n·(M_c/M)/n_c for n_c of n picks out of
    M_c samples: (1/n)·Σ wᵢgᵢ is then the sum over classes of M_c/M times the mean gradient of their picks, which is
    unbiased. Where a class's quota m·M_c/M is below one (all classes, if there are more than m), it gets a pick with
    that probability, of weight one: so the whole stays unbiased. See :func:`allocate`. Which integers stand for the
    classes does not matter; samples that the loss ignores (a label of -100) are a class of their own. It needs no
    pass but the batch's labels, and costs O(M log M).

    Args:
        candidates (Candidates): With labels.
        m (int): The number of picks.

    Raises:
        ValueError: If the batch has no labels or they are no classes, or m is out of range.
    """
    check_num_picks(m, candidates.num_samples)
    _, classes, counts = candidates.labels.cpu().unique(return_inverse=True, return_counts=True)
    given = allocate(counts, m)
    shuffled = torch.randperm(len(classes))
    by_class = shuffled[classes[shuffled].argsort(stable=True)]
    starts = counts.cumsum(0) - counts
    within = torch.arange(len(classes)) - starts[classes[by_class]]
    indices = by_class[within < given[classes[by_class]]]
    quotas = m * counts.double() / len(classes)
    weights = torch.where(quotas < 1, 1.0, quotas / given)
    return Picks(indices, weights[classes[indices]])
