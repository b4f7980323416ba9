"""Graphs compiled by Inductor, for models that are trained compiled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from composer_gradmatch.forward.torch_private import (
    TorchDynamoException,
    dynamo_config,
    raised_by_backend,
    remove_from_cache,
)
from composer_gradmatch.reuse.unsupported import first_line

__all__ = ["InductorGraph"]


class InductorGraph:
    """A graph of AOTAutograd that is compiled when it is first called; if it cannot be, it runs as it is.

    It draws the random numbers that the graph as it is would draw.

    Args:
        module (fx.GraphModule): The graph.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        # Of a module itself, Dynamo counts what it has compiled together with that of all others.
        self._compiled: Callable[..., Any] = torch.compile(module.forward, options={"fallback_random": True})
        #: Why it could not be compiled, once that is known.
        self.failure: str | None = None
        weakref.finalize(self, remove_from_cache, module.forward.__code__).atexit = False

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        """Tells what the graph returns for the arguments."""
        if self.failure is not None:
            return self._module(*args)
        # Without the marks of sizes that vary, which are for the capture.
        detached = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        try:
            with dynamo_config.patch(automatic_dynamic_shapes=True):
                return self._compiled(*detached)
        except TorchDynamoException as error:
            self.failure = first_line(raised_by_backend(error))
            return self._module(*args)
