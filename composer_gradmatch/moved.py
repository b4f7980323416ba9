"""Where the modules of version 0.1.0 are now: importing one by its old name still works, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "redirect"]

#: Old name → the modules that have its names now.
MOVED: dict[str, tuple[str, ...]] = {
    "builders": ("train.builders", "train.registry", "train.section_checks"),
    "enough_samples": ("algorithms.enough_samples", "forward.batch_norm"),
    "gradmatch": ("algorithms.gradmatch", "algorithms.functional", "last_layer"),
    "layer_gradients": ("last_layer.gradients",),
    "loss_backprop": ("algorithms.loss_backprop", "rules.loss_percentiles"),
    "match": ("matching.weighted_picks",),
    "other_algorithms": ("algorithms.other_algorithms", "forward.composer_private"),
    "output_layer": ("last_layer",),
    "passes": ("algorithms.select_first",),
    "position_gram": ("last_layer.position_gram",),
    "pretrained": ("models.pretrained",),
    "random_backprop": ("algorithms.random_backprop", "rules.uniform"),
    "schedule": ("algorithms.schedule",),
    "selection": ("rules.picks",),
    "selection_pass": ("forward.traceless", "forward.ranks", "forward.precision", "forward.scaling"),
    "solvers": ("matching",),
    "subset_backprop": ("algorithms.subset_backprop", "rules.picks"),
    **{name: (f"batches.{name}",) for name in ("given_batch", "nests", "picked_rows", "row_codes", "sample_leaves")},
    **{
        name: (f"forward.{name}",) for name in ("huggingface_losses", "loss_scale", "losses", "sample_checks", "traces")
    },
    **{
        name: (f"train.{name}",)
        for name in ("config", "refusals", "run_summary", "schema", "setting_up", "value_rules")
    },
    **{
        f"solvers.{name}": (f"matching.{name}",)
        for name in ("compiled", "nonnegative", "on_device", "one_kernel", "problem", "pursuit", "scikit_learn", "swap")
    },
}


class _Moved(ModuleType):
    """A module by its old name: it has the names of those that have them now."""

    def __getattr__(self, name: str) -> Any:
        package, _, old = self.__name__.partition(".")
        if not name.startswith("__"):
            for module in MOVED[old]:
                found = import_module(f"{package}.{module}")
                if hasattr(found, name):
                    return getattr(found, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Redirect(MetaPathFinder, Loader):
    """Makes modules of their old names."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Finds a module that has moved: see :class:`importlib.abc.MetaPathFinder`."""
        package, _, old = fullname.partition(".")
        if package != __package__ or old not in MOVED:
            return None
        places = " or ".join(f"{package}.{module}" for module in MOVED[old])
        warnings.warn(f"{fullname} has moved to {places}.", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, self, is_package=old == "solvers")

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Makes it: see :class:`importlib.abc.Loader`."""
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Runs nothing: see :class:`importlib.abc.Loader`."""


def redirect() -> None:
    """Lets modules be imported by their old names, from now on."""
    if not any(isinstance(finder, _Redirect) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Redirect())
