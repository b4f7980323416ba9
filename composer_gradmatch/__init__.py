"""Selective backprop by gradient matching for MosaicML Composer, with honest baselines.

Names are loaded when they are first used: :func:`gram_omp`, :func:`last_layer_gram` and :func:`normalize_weights`
need no Composer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_ROOMS = {
    "GradMatch": "gradmatch",
    "LossBackprop": "loss_backprop",
    "RandomBackprop": "random_backprop",
    "gram_omp": "matching",
    "last_layer_gram": "last_layer",
    "normalize_weights": "matching",
    "select_first": "passes",
    "select_using_gradient_matching": "gradmatch",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS.values():
        return import_module(f"{__name__}.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
