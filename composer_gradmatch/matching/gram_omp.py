"""Pure mathematics on the Gram matrix of per-sample gradients.

Index legend, used in every folder: ``m`` samples of a minibatch (M of them), ``k`` picks, ``d`` inputs of the
output layer, ``c`` its outputs. ``gram[i, j] = gᵢᵀgⱼ`` for the samples' gradients ``g``, and
``target[i] = gᵢᵀḡ`` for the vector ḡ that the picks are to match (the minibatch's mean gradient).
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch

from composer_gradmatch.matching.on_device import fixed_omp
from composer_gradmatch.matching.problem import Precision, Problem, cancels
from composer_gradmatch.matching.solvers import Solver, check_solver, is_number, solve

__all__ = ["gram_omp"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)


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
    - any function of a :class:`.Problem` that returns picks and weights, in the order picked. What it returns is
      checked, and K and t are read-only. ``ridge`` and ``tolerance`` are in the problem, and the function's to heed.

    All of the solvers' tolerances are relative, so scaling the problem scales nothing but its own numbers. They are
    those of the coarser dtype of ``gram`` and ``target``: in float32 and below, what rounding hides is not picked.

    Args:
        gram (np.ndarray | torch.Tensor): K, shape (M, M), symmetric positive semi-definite. Not modified. Its dtype
            says how exact it is, and so which samples count as linearly dependent: pass float32 as float32. A matrix
            that was computed in float32 and cast to float64 cannot be told from an exact one; its rounding error
            then passes for independent gradients where ``k`` is above their rank, in weights without meaning.
        target (np.ndarray | torch.Tensor): t, shape (M,). Not modified.
        k (int): The largest number of picks, 1 ≤ k ≤ M.
        solver (str | Callable, optional): ``"omp"``, ``"nonnegative"``, ``"swap"``, ``"sklearn"``, or a function of a
            :class:`.Problem`. Default: ``"omp"``.
        ridge (float, optional): λ relative to the mean of K's diagonal, at least 0. Default: ``0.0``.
        tolerance (float, optional): Stops at the first step whose error, ‖Σᵢ wᵢgᵢ − ḡ‖² + λ‖w‖², is at most
            ``tolerance`` times ‖ḡ‖², in [0, 1); 0 to make ``k`` picks however small it is. A large ``ridge`` can keep
            the error above it. Default: ``0.0``.
        norm_squared (float, optional): ‖ḡ‖², for the tolerance; None where the target is the row means of K, and
            ‖ḡ‖² is their mean. Default: ``None``.

    Returns:
        tuple: ``(indices, weights)``, each of shape (n,) with n ≤ k and in the order picked: int64 indices and
        the unnormalised weights, γ = (K[I, I] + λI)⁻¹t[I] but for ``"nonnegative"`` and a function. Of the same kind
        (and device) as ``gram``; the weights have its dtype, the arithmetic is float64.

    Raises:
        TypeError: If ``k`` is not an integer, or ``gram`` and ``target`` are not arrays of the same kind; or if a
            function returns no pair.
        ValueError: If a shape, ``k``, ``solver``, ``ridge`` or ``tolerance`` is out of range, or a number is not
            finite; or if a function returns what is not distinct picks of these samples and a finite weight for each.
    """
    if not any(isinstance(gram, kind) and isinstance(target, kind) for kind in (np.ndarray, torch.Tensor)):
        raise TypeError(
            "gram and target must both be numpy arrays or both be torch tensors, "
            f"got {type(gram).__name__} and {type(target).__name__}."
        )
    _check_sizes(tuple(gram.shape), tuple(target.shape), k)
    check_solver(solver, ridge, tolerance)
    if norm_squared is not None and not (is_number(norm_squared) and 0 <= norm_squared < float("inf")):
        raise ValueError(f"norm_squared must be a number >= 0, ‖ḡ‖² of what is matched; got {norm_squared!r}.")
    if _is_complex(gram) or _is_complex(target):
        raise ValueError(f"gram and target must be real, got {gram.dtype} and {target.dtype}.")
    indices: Any
    weights: Any
    if solver == "omp" and tolerance == 0 and isinstance(gram, torch.Tensor) and gram.is_cuda:
        assert isinstance(target, torch.Tensor)
        indices, weights = _solve_on_device(gram, target, k, ridge)
    else:
        precision = _precision(gram, target)
        indices, weights = _solve_on_host(
            _host(gram), _host(target), k, solver, ridge, tolerance, norm_squared, precision
        )
    return _like(gram, indices, weights)


def _check_sizes(gram: tuple[int, ...], target: tuple[int, ...], k: int) -> None:
    if len(gram) != 2 or gram[0] != gram[1]:
        raise ValueError(f"gram must be a square matrix (M, M), got shape {gram}.")
    if target != gram[:1]:
        raise ValueError(f"target must have shape ({gram[0]},) to go with gram, got {target}.")
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k must be an integer, got {k!r}.")
    if not 1 <= k <= gram[0]:
        raise ValueError(f"k must be between 1 and the number of samples, {gram[0]}; got {k}.")


def _check_finite(*arrays: np.ndarray | torch.Tensor) -> None:
    for array in arrays:
        if not (array.isfinite() if isinstance(array, torch.Tensor) else np.isfinite(array)).all():
            raise ValueError("gram and target must be finite; they hold NaN or infinity.")


def _is_complex(array: np.ndarray | torch.Tensor) -> bool:
    return array.is_complex() if isinstance(array, torch.Tensor) else array.dtype.kind == "c"


def _is_floating(array: np.ndarray | torch.Tensor) -> bool:
    return array.is_floating_point() if isinstance(array, torch.Tensor) else array.dtype.kind == "f"


def _precision(*arrays: np.ndarray | torch.Tensor) -> Precision:
    """Tells how exact arrays are by their dtypes; integers are."""
    return Precision.of(
        *(
            torch.finfo(array.dtype) if isinstance(array, torch.Tensor) else np.finfo(array.dtype)
            for array in arrays
            if _is_floating(array)
        )
    )


def _host(array: np.ndarray | torch.Tensor) -> np.ndarray:
    if not isinstance(array, torch.Tensor):
        return array
    array = array.detach().cpu()
    known = array.dtype in (torch.float64, torch.float32, torch.float16)
    return (array.float() if array.is_floating_point() and not known else array).numpy()


def _like(gram: Array, indices: Any, weights: Any) -> tuple[Array, Array]:
    """Brings picks and weights to the kind, device and floating dtype of the Gram matrix."""
    if isinstance(gram, torch.Tensor):
        dtype = gram.dtype if _is_floating(gram) else torch.float64
        return torch.as_tensor(indices).to(gram.device), torch.as_tensor(weights).to(gram.device, dtype)
    return indices, weights.astype(gram.dtype if _is_floating(gram) else np.float64)


def _solve_on_device(
    gram: torch.Tensor, target: torch.Tensor, k: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    precision = _precision(gram, target)
    wide, wide_target = gram.double(), target.double()
    _check_finite(wide, wide_target)
    indices, weights = fixed_omp(wide, wide_target, int(k), float(ridge), precision)
    n = 0
    if weights.any() and not cancels(wide, wide_target, precision):
        n = int((weights != 0).cumsum(0).argmax()) + 1  # Past the last one, pursuit has stopped.
    return indices[:n], weights[:n]


def _solve_on_host(
    gram: np.ndarray,
    target: np.ndarray,
    k: int,
    solver: Solver,
    ridge: float,
    tolerance: float,
    norm_squared: float | None,
    precision: Precision,
) -> tuple[np.ndarray, np.ndarray]:
    """States the problem, with its shares made absolute, and hands it to a solver."""
    if gram.dtype not in (np.float64, np.float32):  # Which another byte order is not, either.
        gram = gram.astype(np.float64)
    target = np.asarray(target, dtype=np.float64)
    _check_finite(gram, target)
    penalty = ridge * float(np.diagonal(gram).mean(dtype=np.float64)) if ridge else 0.0
    enough = float("inf")
    if tolerance > 0:
        # The mean of row means that cancel can come out below zero; there is nothing to match, then.
        enough = (1 - tolerance) * (max(0.0, float(target.mean())) if norm_squared is None else norm_squared)
    if cancels(gram, target, precision):
        return np.empty(0, dtype=np.int64), np.empty(0)
    rows = gram if gram.flags.c_contiguous else gram.T  # K is symmetric: of the two the one with its rows in memory.
    return solve(Problem(rows, target, int(k), penalty, enough, precision), solver)
