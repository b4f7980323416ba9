"""What the solvers of the matching reach: their residuals and times, and how far greedy is from the optimum."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from composer_gradmatch import gram_omp
from composer_gradmatch.benchmarks.problems import PROBLEMS, gram_matrices
from composer_gradmatch.benchmarks.timing import interleaved_medians
from composer_gradmatch.matching.weighted_picks import match_mean_gradient

__all__ = ["VARIANTS", "measure_greedy", "measure_solvers", "smallest_error"]

#: Name → arguments of :func:`.gram_omp`.
VARIANTS: dict[str, dict[str, Any]] = {
    "omp": {},
    "sklearn": {"solver": "sklearn"},
    "nonnegative": {"solver": "nonnegative"},
    "swap": {"solver": "swap"},
    "ridge 0.1": {"ridge": 0.1},
    "ridge 1": {"ridge": 1.0},
    "tolerance 0.1": {"tolerance": 0.1},
}
#: Subsets at a time in the enumeration.
_CHUNK = 4096


def _relative_error(gram: torch.Tensor, picks: torch.Tensor, weights: torch.Tensor) -> float:
    """Computes ‖Σwᵢgᵢ − ḡ‖² / ‖ḡ‖² of a solver's own weights."""
    target = gram.mean(1)
    error = weights @ gram[picks][:, picks] @ weights - 2 * weights @ target[picks] + target.mean()
    return float(error.clamp(min=0) / target.mean())


def measure_solvers(
    num_samples: int = 128, keeps: Sequence[float] = (0.1, 0.3, 0.5), count: int = 20
) -> list[dict[str, Any]]:
    """Gives a row for each problem, m and variant, with means over minibatches.

    Args:
        num_samples (int, optional): M. Default: ``128``.
        keeps (Sequence[float], optional): m/M. Default: ``(0.1, 0.3, 0.5)``.
        count (int, optional): Minibatches of each problem. Default: ``20``.

    Returns:
        list[dict[str, Any]]: Columns problem, m, solver; the mean number of picks of positive weight; the mean relative
        squared error of the solver's own weights, and of the step that is made of them, clipped and normalised; the
        mean effective sample size; the share of picks with negative weight; and the median time in ms.
    """
    rows = []
    for problem in PROBLEMS:
        grams = list(gram_matrices(problem, num_samples, count))
        for keep in keeps:
            m = max(1, int(keep * num_samples))
            calls = {name: _caller(grams, m, arguments) for name, arguments in VARIANTS.items()}
            times = interleaved_medians(calls, rounds=5, calls=count)
            for name, arguments in VARIANTS.items():
                results = [gram_omp(gram, gram.mean(1), m, **arguments) for gram in grams]
                matches = [match_mean_gradient(gram, m, **arguments) for gram in grams]
                found = [match for match in matches if match is not None]
                picked = sum(len(picks) for picks, _ in results)
                negative = sum(int((weights < 0).sum()) for _, weights in results)
                rows.append(
                    {
                        "problem": problem,
                        "m": m,
                        "solver": name,
                        "picks": statistics.mean(len(match.weights) for match in found),
                        "error": statistics.mean(
                            _relative_error(gram, *result) for gram, result in zip(grams, results, strict=True)
                        ),
                        "error of the step": statistics.mean(float(match.residual) for match in found),
                        "effective sample size": statistics.mean(
                            float(match.metrics(num_samples)["effective_sample_size"]) for match in found
                        ),
                        "negative weights": negative / picked,
                        "time (ms)": times[name] * 1e3,
                    }
                )
    return rows


def _caller(grams: Sequence[torch.Tensor], m: int, arguments: dict[str, Any]) -> Any:
    turn = iter(range(10**9))
    targets = [gram.mean(1) for gram in grams]

    def call() -> Any:
        i = next(turn) % len(grams)
        return gram_omp(grams[i], targets[i], m, **arguments)

    return call


def smallest_error(gram: torch.Tensor, m: int) -> float:
    """Finds the optimum of eq. 1 by enumeration: the smallest ‖Σwᵢgᵢ − ḡ‖² / ‖ḡ‖² of any m samples and weights.

    Args:
        gram (torch.Tensor): K, shape (M, M), float64, of which any m rows are linearly independent.
        m (int): The number of samples.
    """
    target = gram.mean(1)
    subsets = torch.tensor(list(combinations(range(len(gram)), m)))
    explained = 0.0
    for chunk in subsets.split(_CHUNK):
        right = target[chunk]
        lower = torch.linalg.cholesky(gram[chunk[:, :, None], chunk[:, None, :]])
        z = torch.linalg.solve_triangular(lower, right[:, :, None], upper=False)
        explained = max(explained, float(z.square().sum((1, 2)).max()))
    return max(0.0, 1 - explained / float(target.mean()))


def measure_greedy(num_samples: int = 16, picks: Sequence[int] = (2, 4, 6, 8), count: int = 50) -> list[dict[str, Any]]:
    """Tells how good is greedy: the error of each solver relative to the exact optimum's.

    Args:
        num_samples (int, optional): M, small enough to enumerate all subsets. Default: ``16``.
        picks (Sequence[int], optional): m. Default: ``(2, 4, 6, 8)``.
        count (int, optional): Minibatches of each problem. Default: ``50``.

    Returns:
        list[dict[str, Any]]: Columns problem, m, solver, the mean and the worst ratio of the squared errors, and the
        share of minibatches in which the solver finds the optimum. Where the optimum is zero but for rounding, a
        minibatch does not count.
    """
    rows = []
    for problem in PROBLEMS:
        grams = list(gram_matrices(problem, num_samples, count))
        for m in picks:
            optima = [smallest_error(gram, m) for gram in grams]
            for name in ("omp", "sklearn", "nonnegative", "swap"):
                ratios = [
                    _relative_error(gram, *gram_omp(gram, gram.mean(1), m, **VARIANTS[name])) / optimum
                    for gram, optimum in zip(grams, optima, strict=True)
                    if optimum > 1e-9
                ]
                rows.append(
                    {
                        "problem": problem,
                        "M": num_samples,
                        "m": m,
                        "solver": name,
                        "mean ratio": statistics.mean(ratios or [float("nan")]),
                        "worst ratio": max(ratios, default=float("nan")),
                        "optimal": statistics.mean([ratio < 1 + 1e-6 for ratio in ratios] or [float("nan")]),
                    }
                )
    return rows
