"""Pure mathematics on the Gram matrix of per-sample gradients.

Index legend, used in every room: ``m`` samples of a minibatch (M of them), ``k`` picks, ``d`` inputs of the
output layer, ``c`` its outputs. ``gram[i, j] = gᵢᵀgⱼ`` for the samples' gradients ``g``, and
``target[i] = gᵢᵀḡ`` for the vector ḡ that the picks are to match (the minibatch's mean gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from numbers import Integral, Real
from typing import Literal, TypeVar

import numpy as np
import torch

from composer_gradmatch.matching.nonnegative import solve_nonnegative
from composer_gradmatch.matching.on_device import fixed_omp
from composer_gradmatch.matching.problem import Precision, Problem, cancels
from composer_gradmatch.matching.pursuit import solve_omp
from composer_gradmatch.matching.scikit_learn import solve_sklearn
from composer_gradmatch.matching.swap import solve_swap

__all__ = [
    "SOLVERS",
    "Solver",
    "check_solver",
    "effective_sample_size",
    "gram_omp",
    "matching_residual",
    "normalize_weights",
]

Array = TypeVar("Array", np.ndarray, torch.Tensor)
Solver = Literal["omp", "nonnegative", "swap", "sklearn"]
_NOT_FINITE = "gram and target must be finite; they hold NaN or infinity."
SOLVERS: tuple[Solver, ...] = ("omp", "nonnegative", "swap", "sklearn")


def gram_omp(
    gram: Array,
    target: Array,
    k: int,
    *,
    solver: Solver = "omp",
    ridge: float = 0.0,
    tolerance: float = 0.0,
    norm_squared: float | None = None,
) -> tuple[Array, Array]:
    """Picks at most ``k`` samples and their weights by orthogonal matching pursuit on a Gram matrix.

    Greedily approximates min_w ‖Σᵢ wᵢgᵢ − ḡ‖² + λ‖w‖² subject to ‖w‖₀ ≤ k (eq. 1 of Balles et al., 2023, there
    with λ = 0) by their Algorithm 2, with the residual correlation α = t − K[:, I]γ taken from t in each step (the
    algorithm is printed with ``α ← α − K γ``, which would subtract earlier steps again).

    The solvers:

    - ``"omp"``: a step picks the largest α, signed, and no sample twice. It stops early, with fewer than ``k``
      picks, when no sample is left with α > 0, or when the next sample is linearly dependent on the picked ones.
      Weights can come out negative. Compiled where numba is installed; float64 and float32 arrays, and tensors on
      the CPU, are not copied; on a GPU the work is done there (:func:`.fixed_omp`), and only the number of picks is
      asked.
    - ``"nonnegative"``: the same, but the weights of each step are the best non-negative ones, and a sample whose
      weight becomes zero is not a pick any more (:func:`.solve_nonnegative`).
    - ``"swap"``: ``"omp"``, then the best exchange of a picked for an unpicked sample for as long as the error falls
      (:func:`.solve_swap`). Like ``"nonnegative"`` it takes milliseconds at M = 128, but seconds at M = 1024.
    - ``"sklearn"``: :func:`sklearn.linear_model.orthogonal_mp_gram`, which the paper's experiments used: it picks the
      α of largest magnitude, so that weights can come out negative.

    All of the solvers' tolerances are relative, so scaling the problem scales nothing but its own numbers. They are
    those of the coarser dtype of ``gram`` and ``target``: in float32 and below, what rounding hides is not picked.

    Args:
        gram (np.ndarray | torch.Tensor): K, shape (M, M), symmetric positive semi-definite. Not modified. Its dtype
            says how exact it is, and so which samples count as linearly dependent: pass float32 as float32. A matrix
            that was computed in float32 and cast to float64 cannot be told from an exact one; its rounding error
            then passes for independent gradients where ``k`` is above their rank, in weights without meaning.
        target (np.ndarray | torch.Tensor): t, shape (M,). Not modified.
        k (int): The largest number of picks, 1 ≤ k ≤ M.
        solver (str, optional): ``"omp"``, ``"nonnegative"``, ``"swap"`` or ``"sklearn"``. Default: ``"omp"``.
        ridge (float, optional): λ relative to the mean of K's diagonal, at least 0. Default: ``0.0``.
        tolerance (float, optional): Stops at the first step whose error, ‖Σᵢ wᵢgᵢ − ḡ‖² + λ‖w‖², is at most
            ``tolerance`` times ‖ḡ‖², in [0, 1); 0 to make ``k`` picks however small it is. A large ``ridge`` can keep
            the error above it. Default: ``0.0``.
        norm_squared (float, optional): ‖ḡ‖², for the tolerance; None where the target is the row means of K, and
            ‖ḡ‖² is their mean. Default: ``None``.

    Returns:
        tuple: ``(indices, weights)``, each of shape (n,) with n ≤ k and in the order picked: int64 indices and
        the unnormalised weights, γ = (K[I, I] + λI)⁻¹t[I] but for ``"nonnegative"``. Of the same kind (and
        device) as ``gram``; the weights have its dtype, the arithmetic is float64.

    Raises:
        TypeError: If ``k`` is not an integer, or ``gram`` and ``target`` are not arrays of the same kind.
        ValueError: If a shape, ``k``, ``solver``, ``ridge`` or ``tolerance`` is out of range, or a number is not
            finite.
    """
    if isinstance(gram, torch.Tensor) and isinstance(target, torch.Tensor):
        if gram.is_cuda and solver == "omp" and tolerance == 0:
            return _solve_on_device(gram, target, k, ridge)
        precision = _precision(gram, target)
        indices, weights = _solve(_host(gram), _host(target), k, solver, ridge, tolerance, norm_squared, precision)
        return (
            torch.from_numpy(indices).to(gram.device),
            torch.from_numpy(weights).to(gram.device, gram.dtype if gram.is_floating_point() else torch.float64),
        )
    if isinstance(gram, np.ndarray) and isinstance(target, np.ndarray):
        precision = _precision(gram, target)
        indices, weights = _solve(gram, target, k, solver, ridge, tolerance, norm_squared, precision)
        return indices, weights.astype(gram.dtype if np.issubdtype(gram.dtype, np.floating) else np.float64)
    raise TypeError(
        "gram and target must both be numpy arrays or both be torch tensors, "
        f"got {type(gram).__name__} and {type(target).__name__}."
    )


def check_solver(solver: str, ridge: float, tolerance: float) -> None:
    """Checks what chooses a solver.

    Args:
        solver (str): See :func:`gram_omp`.
        ridge (float): See :func:`gram_omp`.
        tolerance (float): See :func:`gram_omp`.

    Raises:
        ValueError: If one is out of range.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}.")
    if not (_is_number(ridge) and 0 <= ridge < float("inf")):
        raise ValueError(f"ridge must be a number >= 0, a share of the mean squared gradient norm; got {ridge!r}.")
    if not (_is_number(tolerance) and 0 <= tolerance < 1):
        raise ValueError(f"tolerance must be in [0, 1), a share of the squared norm to match; got {tolerance!r}.")


def _precision(*arrays: np.ndarray | torch.Tensor) -> Precision:
    """How exact arrays are by their dtypes; integers are."""
    return Precision.of(
        *(
            torch.finfo(array.dtype) if isinstance(array, torch.Tensor) else np.finfo(array.dtype)
            for array in arrays
            if (array.is_floating_point() if isinstance(array, torch.Tensor) else array.dtype.kind == "f")
        )
    )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_sizes(gram: tuple[int, ...], target: tuple[int, ...], k: int) -> None:
    if len(gram) != 2 or gram[0] != gram[1]:
        raise ValueError(f"gram must be a square matrix (M, M), got shape {gram}.")
    if target != gram[:1]:
        raise ValueError(f"target must have shape ({gram[0]},) to go with gram, got {target}.")
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k must be an integer, got {k!r}.")
    if not 1 <= k <= gram[0]:
        raise ValueError(f"k must be between 1 and the number of samples, {gram[0]}; got {k}.")


def _solve_on_device(
    gram: torch.Tensor, target: torch.Tensor, k: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_sizes(tuple(gram.shape), tuple(target.shape), k)
    check_solver("omp", ridge, 0.0)
    if not (gram.isfinite().all() and target.isfinite().all()):
        raise ValueError(_NOT_FINITE)
    precision = _precision(gram, target)
    wide, wide_target = gram.double(), target.double()
    indices, weights = fixed_omp(wide, wide_target, int(k), float(ridge), precision)
    n = 0
    if weights.any() and not cancels(wide, wide_target, precision):
        n = int((weights != 0).cumsum(0).argmax()) + 1  # Past the last one, pursuit has stopped.
    return indices[:n], weights[:n].to(gram.dtype if gram.is_floating_point() else torch.float64)


def _host(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    known = tensor.dtype in (torch.float64, torch.float32, torch.float16)
    return (tensor.float() if tensor.is_floating_point() and not known else tensor).numpy()


def _solve(
    gram: np.ndarray,
    target: np.ndarray,
    k: int,
    solver: str,
    ridge: float,
    tolerance: float,
    norm_squared: float | None,
    precision: Precision,
) -> tuple[np.ndarray, np.ndarray]:
    """Validates the arrays and hands them to a solver."""
    _check_sizes(tuple(gram.shape), tuple(target.shape), k)
    check_solver(solver, ridge, tolerance)
    if norm_squared is not None and not (_is_number(norm_squared) and 0 <= norm_squared < float("inf")):
        raise ValueError(f"norm_squared must be a number >= 0, ‖ḡ‖² of what is matched; got {norm_squared!r}.")
    if np.issubdtype(gram.dtype, np.complexfloating) or np.issubdtype(target.dtype, np.complexfloating):
        raise ValueError(f"gram and target must be real, got {gram.dtype} and {target.dtype}.")
    if gram.dtype not in (np.float64, np.float32):  # Which another byte order is not, either.
        gram = gram.astype(np.float64)
    target = np.asarray(target, dtype=np.float64)
    if not (np.isfinite(gram).all() and np.isfinite(target).all()):
        raise ValueError(_NOT_FINITE)
    penalty = ridge * float(np.diagonal(gram).mean(dtype=np.float64)) if ridge else 0.0
    enough = float("inf")
    if tolerance > 0:
        # The mean of row means that cancel can come out below zero; there is nothing to match, then.
        enough = (1 - tolerance) * (max(0.0, float(target.mean())) if norm_squared is None else norm_squared)
    if cancels(gram, target, precision):
        return np.empty(0, dtype=np.int64), np.empty(0)
    rows = gram if gram.flags.c_contiguous else gram.T  # K is symmetric: of the two the one with its rows in memory.
    return _solver(solver)(Problem(rows, target, int(k), penalty, enough, precision))


@cache
def _omp() -> Callable[[Problem], tuple[np.ndarray, np.ndarray]]:
    """Algorithm 2, compiled if numba is installed."""
    try:
        from composer_gradmatch.matching.compiled import solve_compiled
    except ImportError:
        return solve_omp
    return solve_compiled


def _solver(name: str) -> Callable[[Problem], tuple[np.ndarray, np.ndarray]]:
    if name == "nonnegative":
        return solve_nonnegative
    if name == "swap":
        return solve_swap
    if name == "sklearn":
        return solve_sklearn
    return _omp()


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


def matching_residual(
    gram: torch.Tensor, target: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The relative matching residual ‖(1/n)Σᵢ wᵢgᵢ − ḡ‖² / ‖ḡ‖² of normalised weights.

    The weights are those that training uses, with sum n, taken per unit weight; unnormalised least-squares
    weights leave a smaller residual, but it is not the step that is made.

    Args:
        gram (torch.Tensor): K, shape (M, M).
        target (torch.Tensor): The row means of K, shape (M,).
        indices (torch.Tensor): I, shape (n,).
        weights (torch.Tensor): w, shape (n,), with sum n.

    Returns:
        torch.Tensor: The residual, a scalar on the device of ``gram``; 0 for a perfect match, NaN if ‖ḡ‖ = 0.
    """
    unit = weights / len(weights)
    mean_squared = target.mean()
    picked = gram.index_select(0, indices).index_select(1, indices)
    error = unit @ picked @ unit - 2 * unit @ target.index_select(0, indices) + mean_squared
    return torch.where(mean_squared > 0, error.clamp(min=0) / mean_squared, torch.nan)


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    """Kish's effective sample size (Σw)²/Σw², a scalar: n for n equal weights, 1 if one carries everything."""
    return weights.sum() ** 2 / (weights**2).sum()
