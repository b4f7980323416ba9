"""The Gram matrix of last-layer gradients where the layer runs at many positions of each sample.

For n positions in all, of m samples, an output layer with d inputs and c outputs: row n of H (N×D) holds the
layer's input at a position, row n of P (N×C) the gradient of the *sum* of the losses at its output. A sample's
gradient is the sum over its positions, gᵢ = Σₜ pᵢₜhᵢₜᵀ, so Kᵢⱼ = Σₜₛ (hᵢₜ·hⱼₛ + 1)(pᵢₜ·pⱼₛ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["BLOCK_BYTES", "SoftmaxGrads", "position_gram"]

#: The most memory that a block of the work takes beside its operands and K: 64 MiB, or a single row or column of a
#: block where even that takes more.
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SoftmaxGrads:
    """P of a softmax cross-entropy, kept as what it takes to compute any of its columns again, exactly.

    pₙ = scaleₙ · (softmax(zₙ) − e(labelₙ)) with zₙ = Whₙ + b.

    Attributes:
        logsumexp (torch.Tensor): Of zₙ, shape (N,), float32 or better.
        labels (torch.Tensor): int64, shape (N,).
        scales (torch.Tensor): Shape (N,).
        rest (torch.Tensor): 1 − softmax(zₙ)[labelₙ], from the other classes, shape (N,).
    """

    logsumexp: torch.Tensor
    labels: torch.Tensor
    scales: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def recognise(cls, logits: torch.Tensor, grads: torch.Tensor) -> SoftmaxGrads | None:
        """Tells what P (N×C) is made of if it comes from a softmax cross-entropy of the logits z (N×C), else None."""
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        tolerance = 1e-4 if grads.dtype in (torch.float32, torch.float64) else 2e-2
        parts = []
        rows = max(1, BLOCK_BYTES // (12 * logits.shape[1]))
        for z, p in zip(logits.split(rows), grads.split(rows), strict=True):
            logsumexp = z.to(wide).logsumexp(1)
            labels = p.argmin(1)
            probabilities = (z.to(wide) - logsumexp[:, None]).exp_()
            # 1 − softmax(z)[label] from the others: no cancellation where the label is almost certain.
            probabilities.scatter_(1, labels[:, None], 0.0)
            rest = probabilities.sum(1)
            others = p.sum(1, dtype=wide) - p.gather(1, labels[:, None])[:, 0]
            scales = torch.where(rest > 0, others / rest, 0.0)
            probabilities.scatter_(1, labels[:, None], -rest[:, None])
            difference = probabilities.mul_(scales[:, None]).sub_(p).norm(dim=1)
            # A probability that rounds to one leaves an error of its own size, not of the gradient's.
            rounding = 4 * torch.finfo(wide).eps * scales
            if not ((scales >= 0) & (difference <= tolerance * p.to(wide).norm(dim=1) + rounding)).all():
                return None
            parts.append((logsumexp, labels, scales, rest))
        if not parts:
            return None
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def columns(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, start: int, stop: int
    ) -> torch.Tensor:
        """Columns ``start`` to ``stop`` of P, shape (N, stop − start), for the layer's inputs H (N×D)."""
        wide = self.logsumexp.dtype
        logits = F.linear(inputs, weight[start:stop].to(inputs), None if bias is None else bias[start:stop].to(inputs))
        p = (logits.to(wide) - self.logsumexp[:, None]).exp_()
        rows = torch.nonzero((self.labels >= start) & (self.labels < stop))[:, 0]
        p[rows, self.labels[rows] - start] = -self.rest[rows]
        return p.mul_(self.scales[:, None])


def position_gram(
    inputs: torch.Tensor,
    output_grads: torch.Tensor | Callable[[int, int], torch.Tensor],
    counts: torch.Tensor,
    num_outputs: int,
    bias: bool = True,
) -> torch.Tensor:
    """Computes K, by whichever of two forms takes fewer multiply-adds, in blocks of at most :data:`BLOCK_BYTES`.

    The form over pairs of positions takes N²(C + D)/2, the explicit one, over a few outputs at a time, takes
    NCD + M²CD. Neither ever holds the M×C×D gradients. Positions without a gradient are not to be given: what
    is not there costs nothing.

    Args:
        inputs (torch.Tensor): H, shape (N, D), the positions of a sample one after the other.
        output_grads (torch.Tensor | Callable): P, shape (N, C); or a function that returns its columns from a start
            to a stop, for the explicit form.
        counts (torch.Tensor): The number of positions of each sample, int64, shape (M,), with sum N.
        num_outputs (int): C.
        bias (bool, optional): Whether the layer has a bias. Default: ``True``.

    Returns:
        torch.Tensor: K, shape (M, M), float64, on the device of ``inputs``.
    """
    positions, size = inputs.shape
    num_samples = len(counts)
    by_pairs = positions**2 * (size + num_outputs) / 2
    explicit = positions * num_outputs * size + num_samples**2 * num_outputs * size
    if isinstance(output_grads, torch.Tensor):
        if by_pairs <= explicit:
            return _over_pairs(inputs, output_grads, counts, bias)
        return _explicit(inputs, lambda start, stop: output_grads[:, start:stop], counts, num_outputs, bias)
    return _explicit(inputs, output_grads, counts, num_outputs, bias)


def _over_pairs(inputs: torch.Tensor, grads: torch.Tensor, counts: torch.Tensor, bias: bool) -> torch.Tensor:
    """Blocks of pairs of positions, summed over the positions of each pair of samples."""
    num_samples, width = len(counts), inputs.shape[1] + grads.shape[1]
    samples = torch.repeat_interleave(torch.arange(num_samples, device=inputs.device), counts.to(inputs.device))
    gram = inputs.new_zeros(num_samples, num_samples, dtype=torch.float64)
    # Two blocks of rows² and two of rows·(C + D) float64 numbers.
    rows = max(1, int(((width / 2) ** 2 + BLOCK_BYTES / 16) ** 0.5 - width / 2))
    for i in range(0, len(inputs), rows):
        h, p, a = inputs[i : i + rows].double(), grads[i : i + rows].double(), samples[i : i + rows]
        for j in range(0, i + 1, rows):
            products = h @ inputs[j : j + rows].double().T
            if bias:
                products += 1
            products *= p @ grads[j : j + rows].double().T
            by_sample = products.new_zeros(num_samples, products.shape[1]).index_add_(0, a, products)
            block = torch.zeros_like(gram).index_add_(1, samples[j : j + rows], by_sample)
            gram += block if i == j else block + block.T
    return gram


def _explicit(
    inputs: torch.Tensor,
    columns: Callable[[int, int], torch.Tensor],
    counts: torch.Tensor,
    num_outputs: int,
    bias: bool,
) -> torch.Tensor:
    """Gives the gradients of a few outputs at a time: K is the sum of their Gram matrices."""
    num_samples, (positions, size) = len(counts), inputs.shape
    ends = counts.cumsum(0).tolist()
    gram = inputs.new_zeros(num_samples, num_samples, dtype=torch.float64)
    # The gradients, and up to three copies of P's columns.
    width = max(1, BLOCK_BYTES // (8 * (num_samples * (size + 1) + 3 * positions)))
    for start in range(0, num_outputs, width):
        p = columns(start, min(start + width, num_outputs))
        gradients = inputs.new_zeros(num_samples, p.shape[1], size + bias, dtype=torch.float64)
        for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            own = p[begin:end].double().T
            torch.mm(own, inputs[begin:end].double(), out=gradients[i, :, :size])
            if bias:
                gradients[i, :, size] = own.sum(1)
        flat = gradients.flatten(1)
        gram += flat @ flat.T
    return gram
