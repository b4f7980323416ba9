"""Passes of a compiled model that must not be compiled, so that the training step stays so."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from composer_gradmatch.forward.modules import modules_of
from composer_gradmatch.forward.torch_private import has_compiler, runs_compiled

__all__ = ["eagerly", "is_compiled"]


def eagerly(model: nn.Module) -> AbstractContextManager[object]:
    """Lets a compiled model run as it is written, and compiles nothing, while the context is open.

    TorchDynamo keeps a few graphs of each function, for each kind of input one; what comes once they are full runs
    uncompiled for good. A pass that watches a layer would take places in each step, since its hooks are others each
    time, and leave none for the training step. A model that is not compiled is left alone, since it may call functions
    that are, and must be (``flex_attention``).

    Args:
        model (nn.Module): As the pass calls it.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def is_compiled(model: nn.Module) -> bool:
    """Tells whether a model, or a part of it, runs compiled.

    Args:
        model (nn.Module): As the Trainer runs it: of a compiled model under DDP, the wrapper is compiled.
    """
    return has_compiler() and any(map(runs_compiled, modules_of(model)))
