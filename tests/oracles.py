"""Slow, obvious references: explicit per-sample gradients by autograd and brute-force matching pursuit, in float64."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls


def per_sample_gradients(loss_of_sample, parameters, num_samples):
    """Row i: the gradient of sample i's own loss with respect to all parameters, flattened."""
    rows = []
    for i in range(num_samples):
        grads = torch.autograd.grad(loss_of_sample(i), parameters, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def classifier_gradients(module, layer_name, inputs, targets):
    """Float64 per-sample gradients of cross-entropy with respect to one layer's parameters, in training mode."""
    module = copy.deepcopy(module).double().train()
    parameters = list(module.get_submodule(layer_name).parameters())
    losses = F.cross_entropy(module(inputs.double()), targets, reduction="none")
    return per_sample_gradients(lambda i: losses[i], parameters, len(inputs)).numpy()


def brute_force_omp(gradients: np.ndarray, matched: np.ndarray, k: int, *, tolerance: float = 1e-9):
    """Algorithm 2 on explicit gradients: the residual itself, and least squares from scratch for every pick.

    Returns the picks, their weights and, for each pick, by how much the best candidate won over the runner-up,
    relative to the problem's scale (0: a tie, which rounding may decide either way).
    """
    norms = np.linalg.norm(gradients, axis=1)
    scale = max((abs(g @ matched) / n for g, n in zip(gradients, norms, strict=True) if n > 0), default=0.0)
    smallest = max(tolerance * scale, 1e-15 * norms.max())
    picks: list[int] = []
    margins: list[float] = []
    weights = np.empty(0)
    while len(picks) < k:
        residual = matched - gradients[picks].T @ weights
        alpha = gradients @ residual
        candidates = [i for i in range(len(gradients)) if i not in picks and alpha[i] > norms[i] * smallest]
        if not candidates:
            break
        best = max(candidates, key=lambda i: alpha[i])
        rest = [alpha[i] for i in candidates if i != best]
        margins.append((alpha[best] - max(rest, default=0.0)) / (norms[best] * scale))
        picks.append(best)
        weights = np.linalg.lstsq(gradients[picks].T, matched, rcond=None)[0]
    return np.array(picks, dtype=np.int64), weights, margins


def with_ridge(gradients: np.ndarray, penalty: float) -> np.ndarray:
    """Gradients whose least squares have the penalty λ‖w‖²: each with a coordinate √λ of its own."""
    return np.hstack([gradients, np.sqrt(penalty) * np.eye(len(gradients))])


def brute_force_nonnegative_omp(gradients: np.ndarray, matched: np.ndarray, k: int):
    """Non-negative OMP on explicit gradients: SciPy's non-negative least squares on the picked set for every pick."""
    scale = np.linalg.norm(matched) * np.linalg.norm(gradients, axis=1)
    picks: list[int] = []
    weights = np.empty(0)
    error = np.linalg.norm(matched)
    while len(picks) < k:
        alpha = gradients @ (matched - gradients[picks].T @ weights)
        candidates = [i for i in range(len(gradients)) if i not in picks and alpha[i] > 1e-9 * scale[i]]
        if not candidates:
            break
        picks.append(max(candidates, key=lambda i: alpha[i]))
        weights, new_error = nnls(gradients[picks].T, matched)
        picks, weights = [p for p, w in zip(picks, weights, strict=True) if w > 0], weights[weights > 0]
        if new_error >= error * (1 - 1e-12):
            break
        error = new_error
    return np.array(picks, dtype=np.int64), weights


def squared_error(gradients: np.ndarray, matched: np.ndarray, picks) -> float:
    """The smallest ‖Σwᵢgᵢ − ḡ‖² with weights on these picks."""
    chosen = gradients[list(picks)].T
    weights = np.linalg.lstsq(chosen, matched, rcond=None)[0]
    return float(np.sum((chosen @ weights - matched) ** 2))


def clip_and_normalize(picks, weights):
    """The picks of positive weight and their weights, summing to their number."""
    picks, weights = picks[weights > 0], weights[weights > 0]
    return picks, weights / weights.sum() * len(weights)


def reference_selection(module, layer_name, inputs, targets, keep):
    """Independent picks and weights for a classifier: explicit gradients, then brute force."""
    gradients = classifier_gradients(module, layer_name, inputs, targets)
    m = max(1, int(keep * len(inputs)))
    picks, weights, _ = brute_force_omp(gradients, gradients.mean(0), m)
    return clip_and_normalize(picks, weights)


def weighted_gradient(module, inputs, targets, weights):
    """(1/n)Σ wᵢ∇ℓᵢ over all parameters, in float64, by a plain loop over samples' losses."""
    module = copy.deepcopy(module).double().train()
    losses = F.cross_entropy(module(inputs.double()), targets, reduction="none")
    loss = sum(w * loss for w, loss in zip(torch.as_tensor(weights).double(), losses, strict=True)) / len(losses)
    return torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)
