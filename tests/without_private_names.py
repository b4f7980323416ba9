"""Run as a script: trains where torch and Composer have no private interface for the package; saves the parameters."""

from __future__ import annotations

import builtins
import importlib
import sys
import warnings
from pathlib import Path

import composer.algorithms  # noqa: F401  # Which itself needs what is taken away below.
import torch
from composer.trainer import trainer as composer_trainer
from torch.nn.modules import batchnorm

#: Private though their names do not say so.
_DEEP = ("functorch.", "composer.algorithms.ghost_batchnorm.ghost_batchnorm")
_import, _import_module = builtins.__import__, importlib.import_module


def is_missing(module, importer):
    """Whether a module, or a name in it, is private to torch or Composer and asked for by the package."""
    private = module.startswith(("torch.", "composer.")) and "._" in module
    return importer.startswith("composer_gradmatch.") and (private or module.startswith(_DEEP))


def import_statement(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    for each in (name, *(f"{name}.{part}" for part in fromlist or ())):
        if is_missing(each, importer):
            raise ImportError(f"No module named {each!r}")
    return _import(name, globals, locals, fromlist, level)


def import_module(name, package=None):
    if is_missing(name, sys._getframe(1).f_globals["__name__"]):
        raise ImportError(f"No module named {name!r}")
    return _import_module(name, package)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    builtins.__import__, importlib.import_module = import_statement, import_module
    del batchnorm._BatchNorm
    del composer_trainer._generate_run_name

    from cases import BATCHNORM, loader, make_trainer

    from composer_gradmatch import GradMatch, select_first
    from composer_gradmatch.forward.composer_private import _GHOST_BATCH_NORMS, generated_run_name
    from composer_gradmatch.forward.torch_private import BATCH_NORMS, keeping_graphs

    assert _GHOST_BATCH_NORMS == ()
    assert torch.nn.BatchNorm2d in BATCH_NORMS
    with keeping_graphs():
        assert torch._functorch.config.donated_buffer
    name, model = generated_run_name(), BATCHNORM.model()
    algorithm = GradMatch(start=0.0, end=1.0, keep=0.5, interrupt=0, reuse_activations=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(
            model,
            loader(BATCHNORM.data(24), 12),
            [algorithm],
            algorithm_passes=[select_first],
            max_duration="2ba",
            run_name=name,
            seed=1,
        ).fit()
    assert "composer_gradmatch.reuse.single_pass" not in sys.modules
    torch.save(model.state_dict(), sys.argv[1])
    print([str(each.message) for each in caught if "forward passes are made" in str(each.message)])
