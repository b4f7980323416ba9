"""The calibrated random subset: random picks whose weights make up for what their gradients differ by."""

from __future__ import annotations

import torch

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.rules.scores import check_num_picks
from composer_gradmatch.rules.uniform import select_at_random

__all__ = ["Calibrated"]


class Calibrated:
    """Picks at random, and weighs the picks so that their last-layer gradients sum to nearly the minibatch's mean.

    Survey sampling's calibration with a penalty (Deville and Särndal, 1992; Rao and Singh, 1997), which is the
    generalised regression estimator (GREG) with the gradient as the auxiliary variable, known for all samples. Of a
    random subset S of m samples with design weights d = 1/m, the weights are those that minimise
    ‖Σ wᵢgᵢ − ḡ‖² + λ·Σ (wᵢ − dᵢ)²/dᵢ, in closed form w = d + D^½(D^½K_SS D^½ + λI)⁻¹D^½(t_S − K_SS d) with D = diag(d)
    and t the row means of K; the picks' weights are n·w. They may be negative, and sum to n only nearly. The estimate
    is unbiased but for a term that falls as 1/m; of few picks it is too short. It needs gradients, and costs
    O(M²(D + C)) for K and O(m³).

    Args:
        ridge (float, optional): λ in units of m⁻¹·tr(K)/M, the mean eigenvalue of D^½K_SS D^½: large values leave the
            design weights as they are, small ones meet the mean gradient as well as the picks can.
            Default: ``0.1``.

    Raises:
        ValueError: If the ridge is not positive.
    """

    def __init__(self, *, ridge: float = 0.1) -> None:
        if not 0 < ridge < float("inf"):
            raise ValueError(
                f"ridge must be a positive number, how much weights are held to those of a plain mean; got {ridge}."
            )
        self.ridge = ridge

    def __call__(self, candidates: Candidates, m: int) -> Picks | WholeBatch:
        """Draws m samples and weighs them.

        Args:
            candidates (Candidates): With finite gradients.
            m (int): The number of picks.

        Returns:
            Picks | WholeBatch: The minibatch whole where all gradients are zero.
        """
        check_num_picks(m, candidates.num_samples)
        gram = candidates.gram.to("cpu", torch.float64)
        scale = gram.diagonal().mean()
        if not scale > 0:
            return WholeBatch()
        picked = select_at_random(candidates.num_samples, m)
        inner = gram[picked][:, picked] / scale
        missed = gram.mean(1)[picked] / scale - inner.mean(1)
        # With d = 1/m the factors D^½ leave K_SS/m, and w = d + (K_SS + λmI)⁻¹(t_S − K_SS d), all of it in units of K.
        inner.diagonal().add_(self.ridge)
        correction = torch.cholesky_solve(missed[:, None], torch.linalg.cholesky(inner))[:, 0]
        return Picks(picked, 1 + m * correction)
