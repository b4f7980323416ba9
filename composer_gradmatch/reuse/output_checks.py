"""Comparing the outputs of a captured pass with the model's own, in the steps in which that is due."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from composer_gradmatch.batches import take_samples
from composer_gradmatch.forward.modules import modules_of
from composer_gradmatch.forward.torch_private import tree_flatten
from composer_gradmatch.forward.traceless import Generators
from composer_gradmatch.forward.traces import ModelTraces
from composer_gradmatch.reuse.capture import Pass
from composer_gradmatch.reuse.minibatch import Minibatch
from composer_gradmatch.reuse.model_forward import ModelForward
from composer_gradmatch.reuse.spot_checks import SHARE, SpotChecks
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError, first_line
from composer_gradmatch.reuse.verify import check_outputs, distinct_tensors

__all__ = ["OutputChecks", "StaleError"]


class StaleError(UnsupportedError):
    """The captured forward pass is not what the model computes now."""


class OutputChecks:
    """Compares passes with what the model itself does.

    Args:
        forward (ModelForward): The model's own forward.
        precision (Callable): Makes the context of the training step's precision.
    """

    def __init__(self, forward: ModelForward, precision: Callable[[], AbstractContextManager[None]]) -> None:
        self._forward, self._precision = forward, precision
        self._outputs, self._layouts, self._late = (SpotChecks(SHARE) for _ in range(3))
        #: Whether a few samples can be run alone.
        self._runs_alone = True

    def check(self, made: Pass, minibatch: Minibatch) -> None:
        """Compares a pass that has just been made, as far as it is due in this step.

        Raises:
            StaleError: If the model now computes something else.
            UndecidedError: If the outputs are not finite.
            UnsupportedError: If layers mix samples, or nothing can be compared.
        """
        layouts, outputs = self._layouts.due(), self._outputs.due()
        if (layouts or outputs) and not all(bool(value.isfinite().all()) for value in made.run.outputs):
            raise UndecidedError("a minibatch has outputs that are not finite")
        if layouts and made.run.graphs.steps:  # Of a new capture they have just been found.
            with self._layouts.measured():
                made.run.check_layouts()
        if outputs:
            with self._outputs.measured():
                self.compare(made, minibatch)

    def late_is_due(self) -> bool:
        """Tells whether to check once more in this step when the Trainer asks for the pass; asked once in each."""
        return self._late.due()

    def agrees_late(self, made: Pass, minibatch: Minibatch) -> bool:
        """Whether the outputs are the model's own still, after all that a user may do before the Trainer's forward."""
        try:
            with self._late.measured():
                self.compare(made, minibatch)
        except UndecidedError:
            return True
        except UnsupportedError:
            return False
        return True

    def compare(self, made: Pass, minibatch: Minibatch) -> None:
        """Compares the outputs of two samples with those of them alone.

        Those of all samples, with the same random numbers, where there are any, or batch normalisation.
        In low precision rounding may make more of a deep network: then the gradients are verified.

        Raises:
            StaleError: If they differ.
            UndecidedError: If the model's own are not finite.
            UnsupportedError: If they cannot be compared.
        """
        graphs = made.run.graphs
        rows = _two_samples(graphs.steps, minibatch.num_samples)
        together = graphs.random or graphs.normalises or not self._runs_alone
        after, restore = Generators.now(), ModelTraces(modules_of(self._forward.model)).restore
        inputs = minibatch.inputs(minibatch.batch)
        minibatch.start.rewind()
        try:
            with torch.no_grad(), self._precision():
                own = self._forward.own(inputs if together else take_samples(inputs, rows, minibatch.num_samples))
        except Exception as error:
            if together:
                raise UnsupportedError(f"it could not be verified: {first_line(error)}") from error
            self._runs_alone = False
            return
        finally:
            after.restore()
            restore()
        expected = distinct_tensors(tree_flatten(own)[0])
        found = [output if together else output[rows.to(output.device)] for output in made.run.outputs]
        try:
            if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
                raise UnsupportedError("the model itself returns other tensors than when it is captured")
            check_outputs(found, expected, "the model's own" + ("" if together else " on two samples alone"))
        except UndecidedError:
            raise
        except UnsupportedError as error:
            if made.run.in_low_precision:
                graphs.verified_at = graphs.steps + 1
            else:
                raise StaleError(str(error)) from error
        except Exception as error:
            raise UnsupportedError(f"it could not be verified: {first_line(error)}") from error


def _two_samples(step: int, num_samples: int) -> torch.Tensor:
    """Draws samples for a step; two, because a model may squeeze a single one."""
    return torch.tensor(random.Random(step).sample(range(num_samples), min(2, num_samples)))
