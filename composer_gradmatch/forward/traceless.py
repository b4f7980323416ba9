"""The selection forward pass: leaves no trace in the model or the random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from composer_gradmatch.forward.modules import modules_of
from composer_gradmatch.forward.numpy_state import NumpyState
from composer_gradmatch.forward.ranks import is_sharded
from composer_gradmatch.forward.traces import ModelTraces

__all__ = ["Generators", "Moment", "back_at", "beside_training", "no_trace"]


@contextmanager
def no_trace(model: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> Iterator[ModelTraces]:
    """Puts a model and the random number generators back as they were, bit for bit, when the context closes.

    Forward passes in training mode update BatchNorm's statistics, draw dropout masks, count their calls; a pass that
    only selects must not. Of FSDP's modules only the buffers: their attributes are FSDP's business.

    Args:
        model (nn.Module): The model that runs inside the context.
        parameters (Sequence[nn.Parameter], optional): Its parameters that forward changes, which are put back, too.
            Default: ``()``.

    Yields:
        ModelTraces: What is put back, which tells of other parameters that were changed.
    """
    generators = Generators.now()
    modules = modules_of(model)
    traces = ModelTraces(modules, attributes=not is_sharded(modules), contents_of=parameters)
    try:
        yield traces
    finally:
        generators.restore()
        traces.restore()


@dataclass(frozen=True, eq=False)
class Generators:
    """The states of the random number generators of torch (CPU and the current CUDA device), numpy and Python."""

    python: tuple[Any, ...]
    numpy: NumpyState
    cpu: torch.Tensor
    cuda: torch.Tensor | None
    device: int

    @classmethod
    def now(cls) -> Generators:
        """Gives their states as they are."""
        cuda = torch.cuda.is_initialized() and torch.cuda.is_available()
        device = torch.cuda.current_device() if cuda else 0
        return cls(
            random.getstate(),
            NumpyState.now(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if cuda else None,
            device,
        )

    def restore(self) -> None:
        """Puts them back."""
        random.setstate(self.python)
        self.numpy.restore()
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def is_now(self) -> bool:
        """Tells whether nothing has been drawn since."""
        now = Generators.now()
        return (
            self.python == now.python
            and self.numpy.is_now()
            and torch.equal(self.cpu, now.cpu)
            and (self.cuda is None or now.cuda is None or torch.equal(self.cuda, now.cuda))
        )


@dataclass(frozen=True, eq=False)
class Moment:
    """A model's buffers and attributes, and the random number generators, at one moment."""

    traces: ModelTraces
    generators: Generators

    @classmethod
    def now(cls, model: nn.Module) -> Moment:
        """Takes them as they are."""
        return cls(ModelTraces(modules_of(model)), Generators.now())

    def is_now(self) -> bool:
        """Tells whether nothing has changed since."""
        return self.generators.is_now() and not self.traces.changed()

    def restore(self) -> None:
        """Puts back what has changed; graphs that have saved what has not stay valid."""
        self.generators.restore()
        self.traces.restore(only_changed=True)


@contextmanager
def beside_training(model: nn.Module) -> Iterator[None]:
    """Puts back what is changed in the context, in the middle of a training step, whose graph holds what is not.

    Args:
        model (nn.Module): The model.
    """
    before = Moment.now(model)
    yield
    before.restore()


@contextmanager
def back_at(model: nn.Module, moment: Moment | None) -> Iterator[None]:
    """Lets what runs in the context run as at an earlier moment, and goes back to the present.

    Args:
        model (nn.Module): The model.
        moment (Moment, optional): The moment; None where nothing has changed since.
    """
    if moment is None:
        yield
        return
    present = Moment.now(model)
    moment.restore()
    try:
        yield
    finally:
        present.restore()
