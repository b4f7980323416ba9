"""What the error of a step is made of: what averages out over draws and minibatches, and what never does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from composer_gradmatch.rules.step_quality import gradient_noise

__all__ = ["ErrorParts"]

#: Parts of the minibatches that are left out in turn, for standard errors.
_BLOCKS = 10


class ErrorParts:
    """Splits the squared error of weighted subsets into bias² and two variances, all without bias.

    For the step s of a draw on a minibatch and the minibatch's mean gradient ḡ, with e = s − ḡ:

    - bias² is ‖E e‖², the part that does not average out over steps: the mean of ⟨ē, ē′⟩ over pairs of different
      minibatches, ē being a minibatch's mean over draws (a U-statistic);
    - variance over minibatches is E_B‖E[e | B]‖² − ‖E e‖²; its first term is the mean of ⟨e, e′⟩ over pairs of
      different draws of the same minibatch;
    - variance over draws is E_B E‖e − E[e | B]‖², from the draws' sample variances.

    They sum to the mean of ‖e‖². All are told relative to the mean squared error of random picks, (1/m − 1/M)·V with V
    the trace of the samples' covariance in the minibatch, which is exact. Standard errors are the jackknife's over
    blocks of minibatches (Efron and Stein, 1981), of ratios of means.

    Args:
        groups (Mapping[str, torch.Tensor]): Name → which of the P parameters belong to it, booleans of shape (P,).
        picks (Sequence[int]): m of each of the V variants.
        minibatches (int): How many will be seen, at least two.

    Raises:
        ValueError: If there are fewer than two minibatches.
    """

    def __init__(self, groups: Mapping[str, torch.Tensor], picks: Sequence[int], minibatches: int) -> None:
        if minibatches < 2:
            raise ValueError(f"bias can be told from variance on two minibatches or more, got {minibatches}.")
        self.groups = {name: mask for name, mask in groups.items() if mask.any()}
        self.picks = torch.tensor(picks, dtype=torch.float64)
        blocks, size = min(_BLOCKS, minibatches), len(next(iter(groups.values())))
        self._count = torch.zeros(blocks, dtype=torch.float64)
        #: Sums over a block's minibatches: of ē; of ‖e‖², the draws' variance, ‖ē‖² and ⟨s, ḡ⟩; of ‖ḡ‖² and V.
        self._steps = torch.zeros(blocks, len(picks), size, dtype=torch.float64)
        self._own = torch.zeros(blocks, len(self.groups), 4, len(picks), dtype=torch.float64)
        self._shared = torch.zeros(blocks, len(self.groups), 2, dtype=torch.float64)
        self._seen = self._num_samples = 0

    def see(self, gradients: torch.Tensor, coefficients: torch.Tensor) -> None:
        """Takes in a minibatch.

        Args:
            gradients (torch.Tensor): The samples' gradients g, shape (M, P), float64.
            coefficients (torch.Tensor): a of each variant and draw, so that s = Σ aᵢgᵢ: shape (V, D, M), D > 1.

        Raises:
            ValueError: If there is one draw only, or M is not that of the minibatches before.
        """
        draws, m = coefficients.shape[1:]
        if draws < 2 or m != (self._num_samples or m):
            raise ValueError(
                f"expected two draws or more of minibatches of {self._num_samples or m} samples; got {draws} of {m}."
            )
        self._num_samples = m
        block = self._seen % len(self._count)
        self._seen += 1
        errors = coefficients - 1 / m
        mean = errors.mean(1)
        self._count[block] += 1
        self._steps[block] += mean @ gradients
        for group, mask in enumerate(self.groups.values()):
            part = gradients if mask.all() else gradients[:, mask]
            gram = part @ part.T
            squared = ((errors @ gram) * errors).sum(-1)
            of_mean = ((mean @ gram) * mean).sum(-1)
            spread = (squared.sum(1) - draws * of_mean) / (draws - 1)
            product = coefficients.mean(1) @ gram.mean(1)
            self._own[block, group] += torch.stack([squared.mean(1), spread, of_mean, product])
            self._shared[block, group] += torch.stack([gram.mean(), gradient_noise(gram)[1]])

    def rows(self) -> list[list[dict[str, float | str]]]:
        """Gives for each variant a row for each group of parameters.

        Returns:
            list[list[dict]]: With ``parameters`` (the group), ``relative_error`` r and its parts ``bias``,
            ``over_minibatches`` and ``over_draws``, ``step_length`` E⟨s, ḡ⟩/E‖ḡ‖², each with its standard error
            (``..._se``); and ``random_squared_error``, what the first four are relative to, and ``squared_norm``, the
            mean of ‖ḡ‖².
        """
        steps, own, shared, count = self._steps.sum(0), self._own.sum(0), self._shared.sum(0), self._count.sum()
        whole = self._estimate(steps, own, shared, count)
        blocks = len(self._count)
        left_out = [
            self._estimate(steps - self._steps[k], own - self._own[k], shared - self._shared[k], count - self._count[k])
            for k in range(blocks)
        ]
        errors = {}
        for name in whole:
            values = torch.stack([each[name] for each in left_out])
            # NaN of two minibatches, since one alone tells nothing of bias.
            errors[name] = ((blocks - 1) * values.var(0, correction=0)).sqrt()
        random, norm = self._random(shared, count), shared[:, 0] / count
        return [
            [
                {
                    "parameters": name,
                    **{key: float(value[group, variant]) for key, value in whole.items()},
                    **{f"{key}_se": float(value[group, variant]) for key, value in errors.items()},
                    "random_squared_error": float(random[group, variant]),
                    "squared_norm": float(norm[group]),
                }
                for group, name in enumerate(self.groups)
            ]
            for variant in range(len(self.picks))
        ]

    def _random(self, shared: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Gives the mean squared error of as many random picks: sampling without replacement; (groups, V)."""
        return (shared[:, 1] / count)[:, None] * (1 / self.picks - 1 / self._num_samples)

    def _estimate(
        self, steps: torch.Tensor, own: torch.Tensor, shared: torch.Tensor, count: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Makes estimates of sums over minibatches, each of shape (groups, V)."""
        error, draws, of_mean, product = (own / count).unbind(1)
        squares = steps.square()
        of_sum = torch.stack([squares[:, mask].sum(1) for mask in self.groups.values()])
        bias = (of_sum - count * of_mean) / (count * (count - 1))
        random = self._random(shared, count)
        return {
            "relative_error": error / random,
            "bias": bias / random,
            "over_minibatches": (error - draws - bias) / random,
            "over_draws": draws / random,
            "step_length": product / (shared[:, 0] / count)[:, None],
        }
