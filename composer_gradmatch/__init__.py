"""Selective backprop by gradient matching for MosaicML Composer, with honest baselines.

Names are loaded when they are first used: :func:`gram_omp`, :func:`last_layer_gram` and :func:`normalize_weights`
need no Composer.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from composer_gradmatch.moved import redirect

if TYPE_CHECKING:
    from composer_gradmatch.algorithms.functional import select_using_gradient_matching
    from composer_gradmatch.algorithms.gradmatch import GradMatch
    from composer_gradmatch.algorithms.importance_backprop import ImportanceBackprop
    from composer_gradmatch.algorithms.loss_backprop import LossBackprop
    from composer_gradmatch.algorithms.random_backprop import RandomBackprop
    from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
    from composer_gradmatch.algorithms.select_first import select_first
    from composer_gradmatch.algorithms.selection_images import SelectionImages
    from composer_gradmatch.algorithms.selection_log import SelectionLog
    from composer_gradmatch.batches.sample_numbers import number_samples
    from composer_gradmatch.last_layer import last_layer_gram
    from composer_gradmatch.matching import gram_omp, normalize_weights
    from composer_gradmatch.registered import register
    from composer_gradmatch.rules.candidates import Candidates
    from composer_gradmatch.rules.picks import Picks, WholeBatch
    from composer_gradmatch.rules.rule import Rule

__all__ = [
    "Candidates",
    "GradMatch",
    "ImportanceBackprop",
    "LossBackprop",
    "Picks",
    "RandomBackprop",
    "Rule",
    "RuleBackprop",
    "SelectionImages",
    "SelectionLog",
    "WholeBatch",
    "gram_omp",
    "last_layer_gram",
    "normalize_weights",
    "number_samples",
    "register",
    "select_first",
    "select_using_gradient_matching",
]

#: Public name → the module that has it.
_MODULES = {
    "Candidates": "rules.candidates",
    "GradMatch": "algorithms.gradmatch",
    "ImportanceBackprop": "algorithms.importance_backprop",
    "LossBackprop": "algorithms.loss_backprop",
    "Picks": "rules.picks",
    "RandomBackprop": "algorithms.random_backprop",
    "Rule": "rules.rule",
    "RuleBackprop": "algorithms.rule_backprop",
    "SelectionImages": "algorithms.selection_images",
    "SelectionLog": "algorithms.selection_log",
    "WholeBatch": "rules.picks",
    "gram_omp": "matching",
    "last_layer_gram": "last_layer",
    "normalize_weights": "matching",
    "number_samples": "batches.sample_numbers",
    "register": "registered",
    "select_first": "algorithms.select_first",
    "select_using_gradient_matching": "algorithms.functional",
}
#: Folders that ``import composer_gradmatch`` alone gives access to.
_FOLDERS = ("last_layer", "matching")

redirect()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("composer-gradmatch")
        except PackageNotFoundError as error:
            raise AttributeError(f"{__name__} is not installed, so that it has no version") from error
    if name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
