"""Pure mathematics on the Gram matrix of per-sample gradients.

Index legend, used in every room: ``m`` samples of a minibatch (M of them), ``k`` picks, ``d`` inputs of the
output layer, ``c`` its outputs. ``gram[i, j] = gᵢᵀgⱼ`` for the samples' gradients ``g``, and
``target[i] = gᵢᵀḡ`` for the vector ḡ that the picks are to match (the minibatch's mean gradient).
"""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Literal, TypeVar

import numpy as np
import torch

__all__ = ["SOLVERS", "Solver", "effective_sample_size", "gram_omp", "matching_residual", "normalize_weights"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)
Solver = Literal["omp", "sklearn"]
SOLVERS: tuple[Solver, ...] = ("omp", "sklearn")

# Relative to a sample's own squared norm: below this, what is left of its gradient outside the span of the
# picked ones is rounding error. Gradients come from float32 or bfloat16 forward passes, far above it.
_DEPENDENT = 1e-10


def gram_omp(gram: Array, target: Array, k: int, *, solver: Solver = "omp") -> tuple[Array, Array]:
    """Picks at most ``k`` samples and their weights by orthogonal matching pursuit on a Gram matrix.

    Greedily approximates min_w ‖Σᵢ wᵢgᵢ − ḡ‖² subject to ‖w‖₀ ≤ k (eq. 1 of Balles et al., 2023) by their
    Algorithm 2, with the residual correlation α = t − K[:, I]γ taken from t in each step (the algorithm is
    printed with ``α ← α − K γ``, which would subtract earlier steps again).

    With ``solver="omp"`` a step picks the largest α, signed, and no sample twice. It stops early, with fewer
    than ``k`` picks, when no sample is left with α > 0, or when the next sample is linearly dependent on the
    picked ones. All tolerances are relative, so scaling the problem scales nothing but its own numbers.

    With ``solver="sklearn"`` the work is done by :func:`sklearn.linear_model.orthogonal_mp_gram`, which the
    paper's experiments used: it picks the α of largest magnitude, so that weights can come out negative.

    Args:
        gram (np.ndarray | torch.Tensor): K, shape (M, M), symmetric positive semi-definite. Not modified.
        target (np.ndarray | torch.Tensor): t, shape (M,). Not modified.
        k (int): The largest number of picks, 1 ≤ k ≤ M.
        solver (str, optional): ``"omp"`` or ``"sklearn"``. Default: ``"omp"``.

    Returns:
        tuple: ``(indices, weights)``, each of shape (n,) with n ≤ k and in the order picked: int64 indices and
        the unnormalised least-squares weights γ = K[I, I]⁻¹t[I], which may be negative. Of the same kind (and
        device) as ``gram``; the weights have its dtype, the arithmetic is float64.

    Raises:
        TypeError: If ``k`` is not an integer, or ``gram`` and ``target`` are not arrays of the same kind.
        ValueError: If a shape, ``k`` or ``solver`` is out of range, or a number is not finite.
    """
    if isinstance(gram, torch.Tensor) and isinstance(target, torch.Tensor):
        indices, weights = _gram_omp(_as_float64(gram), _as_float64(target), k, solver)
        return (
            torch.from_numpy(indices).to(gram.device),
            torch.from_numpy(weights).to(gram.device, gram.dtype if gram.is_floating_point() else torch.float64),
        )
    if isinstance(gram, np.ndarray) and isinstance(target, np.ndarray):
        indices, weights = _gram_omp(_as_float64(gram), _as_float64(target), k, solver)
        return indices, weights.astype(gram.dtype if np.issubdtype(gram.dtype, np.floating) else np.float64)
    raise TypeError(
        "gram and target must both be numpy arrays or both be torch tensors, "
        f"got {type(gram).__name__} and {type(target).__name__}."
    )


def _as_float64(array: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        return array.detach().to("cpu", torch.float64).numpy()
    return np.asarray(array, dtype=np.float64)


def _gram_omp(gram: np.ndarray, target: np.ndarray, k: int, solver: str) -> tuple[np.ndarray, np.ndarray]:
    """Validates float64 arrays and hands them to a kernel."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square matrix (M, M), got shape {gram.shape}.")
    if target.shape != gram.shape[:1]:
        raise ValueError(f"target must have shape ({gram.shape[0]},) to go with gram, got {target.shape}.")
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k must be an integer, got {k!r}.")
    if not 1 <= k <= len(target):
        raise ValueError(f"k must be between 1 and the number of samples, {len(target)}; got {k}.")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}.")
    if not (np.isfinite(gram).all() and np.isfinite(target).all()):
        raise ValueError("gram and target must be finite; they hold NaN or infinity.")
    kernel = _signed_omp if solver == "omp" else _sklearn_omp
    return kernel(gram, target, int(k))


def _signed_omp(gram: np.ndarray, target: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 2 as a partial pivoted Cholesky factorisation K[I, I] = LLᵀ.

    Row j of ``rows`` is row j of Q = L⁻¹K[I, :], so one product and one rank-one update serve each pick, and
    α = t − Qᵀz with z = L⁻¹t[I]. L is the transpose of Q's picked columns: γ is solved for once, at the end.
    """
    m = len(target)
    norm = np.sqrt(np.clip(np.diagonal(gram), 0.0, None))
    # The best correlation with a single sample bounds ‖ḡ‖ from below and so sets the scale of all α.
    correlation = np.divide(target, norm, out=np.zeros(m), where=norm > 0)
    # A mean gradient that cancels to zero leaves only the rounding error of its products in the target.
    rounding = 8 * np.finfo(np.float64).eps * norm.max(initial=0.0)
    floor = max(_DEPENDENT * np.abs(correlation).max(initial=0.0), rounding) * norm

    alpha = target.copy()
    rows = np.empty((k, m))
    z = np.empty(k)
    picks: list[int] = []
    unpicked = norm > 0
    for j in range(k):
        candidates = np.where(unpicked & (alpha > floor), alpha, -np.inf)
        pick = int(np.argmax(candidates))
        if candidates[pick] == -np.inf:
            break
        row = gram[pick] - rows[:j, pick] @ rows[:j]
        pivot = row[pick]
        if pivot <= _DEPENDENT * gram[pick, pick]:
            break
        row /= np.sqrt(pivot)
        rows[j] = row
        z[j] = alpha[pick] / row[pick]
        alpha -= z[j] * row
        unpicked[pick] = False
        picks.append(pick)

    n = len(picks)
    indices = np.array(picks, dtype=np.int64)
    upper, right = torch.from_numpy(rows[:n, indices]), torch.from_numpy(z[:n, None])
    return indices, torch.linalg.solve_triangular(upper, right, upper=True)[:, 0].numpy()


def _sklearn_omp(gram: np.ndarray, target: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's rule, which stops at absolute thresholds: a power of two brings the problem to order one."""
    from sklearn.linear_model import orthogonal_mp_gram

    largest = np.abs(np.diagonal(gram)).max()
    if largest == 0.0 or not target.any():
        return np.empty(0, dtype=np.int64), np.empty(0)
    scale = 2.0 ** -np.floor(np.log2(largest))
    with warnings.catch_warnings():
        # "ended prematurely due to linear dependence": the caller sees it in the number of picks.
        warnings.filterwarnings("ignore", "(?s).*Orthogonal matching pursuit ended prematurely", RuntimeWarning)
        path = np.asarray(orthogonal_mp_gram(gram * scale, target * scale, n_nonzero_coefs=k, return_path=True))
    path = path.reshape(len(target), -1)
    first_step = np.where(path.any(axis=1), (path != 0).argmax(axis=1), path.shape[1])
    indices = np.argsort(first_step, kind="stable")[: int(path.any(axis=1).sum())].astype(np.int64)
    return indices, np.ascontiguousarray(path[indices, -1])


def normalize_weights(weights: Array) -> Array:
    """Clips weights at zero and scales them to sum to their number (Algorithm 1, after the clipping of §4.2).

    Unweighted selection then corresponds to weights that are all one (the paper's footnote 3).

    Args:
        weights (np.ndarray | torch.Tensor): γ, shape (n,). Not modified.

    Returns:
        np.ndarray | torch.Tensor: Weights of the same kind, shape and dtype, non-negative, with sum n.

    Raises:
        ValueError: If no weight is positive, or one is not finite.
    """
    clipped = weights.clip(min=0)
    # Dividing by the largest first keeps the sum finite and away from zero at any scale.
    largest = float(clipped.max()) if len(clipped) else 0.0
    if not 0.0 < largest < float("inf"):
        raise ValueError(f"weights need at least one positive and only finite values, got {weights!r}.")
    clipped = clipped / largest
    return clipped * (len(clipped) / clipped.sum())  # pyright: ignore[reportReturnType]


def matching_residual(gram: np.ndarray, target: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> float:
    """The relative matching residual ‖(1/n)Σᵢ wᵢgᵢ − ḡ‖² / ‖ḡ‖² of normalised weights.

    The weights are those that training uses, with sum n, taken per unit weight; unnormalised least-squares
    weights leave a smaller residual, but it is not the step that is made.

    Args:
        gram (np.ndarray): K, shape (M, M).
        target (np.ndarray): The row means of K, shape (M,).
        indices (np.ndarray): I, shape (n,).
        weights (np.ndarray): w, shape (n,), with sum n.

    Returns:
        float: The residual; 0 for a perfect match, NaN if ‖ḡ‖ = 0.
    """
    unit = weights / len(weights)
    mean_squared = target.mean()
    if mean_squared <= 0:
        return float("nan")
    error = unit @ gram[np.ix_(indices, indices)] @ unit - 2 * unit @ target[indices] + mean_squared
    return float(max(error, 0.0) / mean_squared)


def effective_sample_size(weights: np.ndarray) -> float:
    """Kish's effective sample size (Σw)²/Σw²: n for n equal weights, 1 if one carries everything."""
    return float(weights.sum() ** 2 / (weights**2).sum())
