"""Made-up gradients, and candidates that have them: what rules do by K, tests do by the rows themselves."""

from __future__ import annotations

import numpy as np
import torch

from composer_gradmatch import Candidates


def gradients(num_samples=10, width=6, seed=0, spread=1.0):
    """Rows g with a common part; float64, shape (M, width)."""
    rng = np.random.default_rng(seed)
    return spread * rng.standard_normal((num_samples, width)) + rng.standard_normal(width)


def having(rows):
    """Candidates with these gradients."""
    return Candidates(len(rows), gram=torch.from_numpy(rows @ rows.T))
