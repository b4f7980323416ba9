"""Every private interface of torch that the package uses, and what is done where a version of torch lacks one.

For some there is a substitute, which this module has. The others are needed to make one forward pass of two: importing
one that is missing from here raises ImportError, and two passes are made. They are imported when they are asked for,
since TorchDynamo takes seconds. Attributes of tensors and modules (``_version``, ``_buffers``, ``_parameters``,
``_modules`` and the hooks) are read where they are needed: a tensor or module without them is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

from torch import nn
from torch.nn.modules import batchnorm

__all__ = [
    "BATCH_NORMS",
    "CAPTURE_LOGGERS",
    "NEEDED",
    "boxed",
    "changed_a_leaf_in_place",
    "compiled_by_inductor",
    "has_compiler",
    "is_from_cuda",
    "is_limit_of_captures",
    "is_of_compiler",
    "keeping_graphs",
    "raised_by_backend",
    "raised_by_worker",
    "reads_environment",
    "runs_compiled",
    "uncompiled",
]

#: What is needed to make one pass of two: where torch has it.
NEEDED = {
    "HigherOrderOperator": "torch._ops:HigherOrderOperator",
    "OpOverload": "torch._ops:OpOverload",
    "tree_flatten": "torch.utils._pytree:tree_flatten",
    "tree_map_only": "torch.utils._pytree:tree_map_only",
    "tree_unflatten": "torch.utils._pytree:tree_unflatten",
    "default_partition": "functorch.compile:default_partition",
    "aot_autograd": "torch._dynamo.backends.common:aot_autograd",
    "cache_entries": "torch._dynamo.eval_frame:_debug_get_cache_entry_list",
    "dynamo_config": "torch._dynamo:config",
    "mark_dynamic": "torch._dynamo:mark_dynamic",
    "maybe_mark_dynamic": "torch._dynamo:maybe_mark_dynamic",
    "remove_from_cache": "torch._dynamo.eval_frame:remove_from_cache",
    "symbolic_convert": "torch._dynamo:symbolic_convert",
    "TorchDynamoException": "torch._dynamo.exc:TorchDynamoException",
    "UserDefinedClassVariable": "torch._dynamo.variables.user_defined:UserDefinedClassVariable",
    "keeps_graph": "torch._C._autograd:_get_current_graph_task_keep_graph",
}


def __getattr__(name: str) -> Any:
    """Imports one of :data:`NEEDED`.

    Raises:
        ImportError: If this torch does not have it.
    """
    if name not in NEEDED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = NEEDED[name].split(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"it has no {module}.{attribute}") from error


#: The loggers that say at length why a model cannot be captured, which the one warning says in a line.
CAPTURE_LOGGERS = (
    "torch._dynamo.convert_frame",
    "torch._dynamo.symbolic_convert",
    "torch._dynamo.utils",
    "torch.fx.experimental.symbolic_shapes",
)

#: The classes of batch normalisation: the one that torch's are derived from, or these.
BATCH_NORMS: tuple[type[nn.Module], ...] = (
    (batchnorm._BatchNorm,)
    if hasattr(batchnorm, "_BatchNorm")
    else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
)


def keeping_graphs() -> AbstractContextManager[Any]:
    """Lets the graphs that a compiled model makes in the context be run backward more than once.

    A torch that does not know of buffers that are given away keeps them in any case.
    """
    try:
        config: Any = import_module("torch._functorch.config")
    except ImportError:
        return nullcontext()
    return config.patch(donated_buffer=False) if hasattr(config, "donated_buffer") else nullcontext()


def boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Tells AOTAutograd that a compiled graph takes its arguments as one list, which it may empty."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def uncompiled(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """Gives the function that ``torch.compile`` has made another of; None where it has not."""
    return getattr(forward, "_torchdynamo_orig_callable", None)


def has_compiler() -> bool:
    """Tells whether TorchDynamo was imported, which takes seconds: else nothing is compiled."""
    return "torch._dynamo" in sys.modules


def runs_compiled(module: nn.Module) -> bool:
    """Tells whether a module's forward, or its call, was compiled."""
    return uncompiled(module.forward) is not None or getattr(module, "_compiled_call_impl", None) is not None


def compiled_by_inductor(forward: Callable[..., Any]) -> bool:
    """Tells whether a function was compiled by Inductor, and not by another backend or not at all."""
    compiler_config = getattr(forward, "get_compiler_config", None)
    return compiler_config is not None and compiler_config() is not None


def is_of_compiler(module: str) -> bool:
    """Tells whether a module, by its name, is a part of what ``torch.compile`` calls."""
    return module.startswith(("torch._dynamo", "torch._inductor"))


def reads_environment(guards: Any) -> bool:
    """Tells whether TorchDynamo's guards of a graph look at a variable of the environment."""
    return any("environ" in part for part in guards.code_parts)


def is_limit_of_captures(error: BaseException) -> bool:
    """Tells whether TorchDynamo says that it has captured a function too often; each version has a class of its own."""
    return "Limit" in type(error).__name__


def raised_by_backend(error: Exception) -> Exception:
    """Tells what a backend of TorchDynamo has raised, which that wraps; any other error as it is."""
    return getattr(error, "inner_exception", error)


def changed_a_leaf_in_place(error: BaseException) -> bool:
    """Tells whether autograd says that a tensor whose gradient is asked for was changed in place."""
    return "used in an in-place operation" in str(error)


def is_from_cuda(error: BaseException) -> bool:
    """Tells whether an error comes from the GPU, and not from what a model was given."""
    return "CUDA" in str(error)


def raised_by_worker(error: BaseException) -> bool:
    """Tells whether an error was raised in a data loader's worker, whose traceback is in the text."""
    return "Original Traceback" in str(error)
