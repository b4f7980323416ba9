"""From a Gram matrix to weighted picks: orthogonal matching pursuit and its variants, without Composer."""

from composer_gradmatch.matching.gram_omp import gram_omp
from composer_gradmatch.matching.solvers import SOLVERS, Solver, check_solver
from composer_gradmatch.matching.weights import (
    WeightKind,
    check_weight_kind,
    effective_sample_size,
    matching_residual,
    normalize_weights,
)

__all__ = [
    "SOLVERS",
    "Solver",
    "WeightKind",
    "check_solver",
    "check_weight_kind",
    "effective_sample_size",
    "gram_omp",
    "matching_residual",
    "normalize_weights",
]
