"""Selective backprop by gradient matching for MosaicML Composer, with honest baselines."""

from composer_gradmatch.gradmatch import GradMatch, select_using_gradient_matching
from composer_gradmatch.last_layer import last_layer_gram
from composer_gradmatch.loss_backprop import LossBackprop
from composer_gradmatch.matching import gram_omp, normalize_weights
from composer_gradmatch.passes import select_first
from composer_gradmatch.random_backprop import RandomBackprop

__all__ = [
    "GradMatch",
    "LossBackprop",
    "RandomBackprop",
    "gram_omp",
    "last_layer_gram",
    "normalize_weights",
    "select_first",
    "select_using_gradient_matching",
]
