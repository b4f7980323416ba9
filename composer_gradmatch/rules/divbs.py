"""Diversified batch selection: samples whose gradients are in line with what the picks do not span yet."""

from __future__ import annotations

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.rules.scores import check_num_picks, filled_up

__all__ = ["divbs"]

#: Below these shares of the largest that they can be, products with the residual are nothing but rounding: of what is
#: left of the mean gradient, and of a mean gradient that is zero; and a gradient is within the picks' span.
_LEFT, _ZERO, _SPANNED = 1e-9, 1e-14, 1e-5


def divbs(candidates: Candidates, m: int) -> Picks | WholeBatch:
    """Draws samples with probabilities |⟨gᵢ, r⟩|, r being what the mean gradient has beside all picks so far.

    DivBS (Hong et al., 2024, "Diversified Batch Selection for Training Acceleration"), as its authors' code has it:
    r = ḡ at first; after each draw the picked gradient is made orthogonal to those before, and r to it. Where nothing
    is left of r, the other picks are drawn at random. As theirs, the picks have no weights. Gradients are not needed
    themselves: all products come from K, as in matching pursuit. It needs gradients, and costs O(M²(D + C)) for K and
    O(m²M).

    Args:
        candidates (Candidates): With finite gradients.
        m (int): The number of picks.

    Returns:
        Picks | WholeBatch: The minibatch whole where its mean gradient is zero.
    """
    check_num_picks(m, candidates.num_samples)
    gram = candidates.gram.to("cpu", torch.float64)
    products = gram.mean(1)  # ⟨gᵢ, r⟩.
    norms = gram.diagonal().clamp(min=0).sqrt()
    smallest = norms * torch.maximum(_LEFT * products.mean().clamp(min=0).sqrt(), _ZERO * norms.max())
    onto = gram.new_zeros(m, len(gram))  # Row t: the products of all gradients with the t-th pick's orthogonal part.
    picks: list[int] = []
    while len(picks) < m:
        chances = torch.where(products.abs() > smallest, products.abs(), 0.0)
        chances[picks] = 0
        if not bool(chances.any()):
            break
        pick = int(torch.multinomial(chances, 1))
        t = len(picks)
        part = gram[pick] - onto[:t, pick] @ onto[:t]
        length = part[pick].clamp(min=0).sqrt()
        picks.append(pick)
        if length > _SPANNED * norms[pick]:
            onto[t] = part / length
            products = products - (products[pick] / length) * onto[t]
    if not picks:
        return WholeBatch()
    return Picks(filled_up(torch.tensor(picks), m, len(gram)))
