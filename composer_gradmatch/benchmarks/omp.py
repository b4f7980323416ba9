"""Orthogonal matching pursuit beside its peers: the time for the same picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from composer_gradmatch import gram_omp
from composer_gradmatch.benchmarks.timing import interleaved_medians, multiply_adds_per_second
from composer_gradmatch.matching.on_device import fixed_omp
from composer_gradmatch.matching.problem import Problem
from composer_gradmatch.matching.pursuit import solve_omp

__all__ = ["SIZES", "contestants", "measure_omp", "unit_gradients"]

#: M and m.
SIZES = ((128, 12), (128, 64), (512, 256), (1024, 512))
OURS = "gram_omp"
_OTHER_RULE = "SPAMS"
_GPU_PEER = "orthogonal-matching-pursuit-gpu"

#: Returns its picks, in any order.
Contestant = Callable[[], Any]


def unit_gradients(num_samples: int, seed: int = 0) -> np.ndarray:
    """Gradients of unit norm, as SPAMS asks for, shape (M, M).

    Drawn in 16·M dimensions, where they are so far from each other that no α is negative and all rules for the next
    pick agree, and then rotated into M.
    """
    gradients = np.random.default_rng(seed).standard_normal((num_samples, 16 * num_samples))
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    return np.linalg.cholesky(gradients @ gradients.T)


def contestants(gradients: np.ndarray, k: int, device: str = "cpu") -> dict[str, Contestant]:
    """Ours and the peers that are installed; each returns its picks.

    Args:
        gradients (np.ndarray): Of unit norm, shape (M, D).
        k (int): The number of picks.
        device (str, optional): ``"cpu"`` or ``"cuda"``. Default: ``"cpu"``.
    """
    gram = gradients @ gradients.T
    target = gram.mean(axis=1)
    found: dict[str, Contestant] = {}
    if device == "cuda":
        tensors = torch.from_numpy(gram).cuda(), torch.from_numpy(target).cuda()
        found[OURS] = lambda: fixed_omp(*tensors, k)[0]
    else:
        found[OURS] = lambda: gram_omp(gram, target, k)[0]
        if find_spec("numba") is not None:
            plain = Problem(gram, target, k)
            found["plain numpy"] = lambda: solve_omp(plain)[0]
        found["scikit-learn"] = _scikit_learn(gram, target, k)
        if find_spec("spams") is not None:
            found[_OTHER_RULE] = _spams(gradients, k)
    if find_spec("orthogonal_matching_pursuit_gpu") is not None:
        found[_GPU_PEER] = _gpu_peer(gradients, gram, k, device)
    return found


def _scikit_learn(gram: np.ndarray, target: np.ndarray, k: int) -> Contestant:
    from sklearn.linear_model import orthogonal_mp_gram

    return lambda: np.flatnonzero(orthogonal_mp_gram(gram, target, n_nonzero_coefs=k))


def _spams(gradients: np.ndarray, k: int) -> Contestant:
    """Takes the atoms, whose Gram matrix it computes itself."""
    import spams  # pyright: ignore[reportMissingImports]

    atoms = np.asfortranarray(gradients.T)
    matched = np.asfortranarray(gradients.mean(axis=0)[:, None])

    def picks() -> Any:
        weights: Any = spams.omp(matched, atoms, L=k)
        return weights.indices

    return picks


def _gpu_peer(gradients: np.ndarray, gram: np.ndarray, k: int, device: str) -> Contestant:
    from orthogonal_matching_pursuit_gpu import omp_v0  # pyright: ignore[reportMissingImports]

    atoms = torch.from_numpy(gradients.T.copy()).to(device)
    matched = torch.from_numpy(gradients.mean(axis=0)[None]).to(device)
    products = torch.from_numpy(gram).to(device)
    return lambda: omp_v0(atoms, matched, products, k)[0][0]


def measure_omp(
    sizes: Sequence[tuple[int, int]] = SIZES, rounds: int = 15, devices: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Gives a row for each size and contestant, which are checked to pick the same samples.

    SPAMS takes the residual correlation relative to what is left of an atom outside the span of the picked ones (order
    recursive matching pursuit), so of it only the number of picks is checked.

    Args:
        sizes (Sequence[tuple[int, int]], optional): M and m. Default: :data:`SIZES`.
        rounds (int, optional): Turns of each contestant, of five calls. Default: ``15``.
        devices (Sequence[str], optional): ``"cpu"``, ``"cuda"`` or both; None for those that are there.
            Default: ``None``.

    Returns:
        list[dict[str, Any]]: Columns device, M, m, solver, the median time in ms, its ratio to ours and, on the CPU, to
        the floor: M·m² multiply-adds at the rate of a product of matrices.

    Raises:
        RuntimeError: If a contestant picks other samples.
    """
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rate = multiply_adds_per_second()
    rows = []
    for device in devices:
        for size, k in sizes:
            found = contestants(unit_gradients(size), k, device)
            picks = {name: sorted(np.unique(torch.as_tensor(call()).cpu()).tolist()) for name, call in found.items()}
            for name, picked in picks.items():
                if len(picked) != k or (picked != picks[OURS] and name != _OTHER_RULE):
                    raise RuntimeError(f"{name} picks other samples than {OURS} at M={size}, m={k}.")
            medians = interleaved_medians(found, rounds, synchronize=device == "cuda")
            floor = size * k**2 / rate
            for name, seconds in medians.items():
                rows.append(
                    {
                        "device": device,
                        "M": size,
                        "m": k,
                        "solver": name,
                        "time (ms)": seconds * 1e3,
                        "ratio to ours": seconds / medians[OURS],
                        "ratio to floor": seconds / floor if device == "cpu" else float("nan"),
                    }
                )
    return rows
