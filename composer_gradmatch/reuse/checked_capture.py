"""Making the forward pass over a minibatch: captured, and captured anew where the model does something else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from composer_gradmatch.last_layer import OutputLayer
from composer_gradmatch.reuse.capture import CapturedForward, Pass
from composer_gradmatch.reuse.minibatch import Minibatch
from composer_gradmatch.reuse.model_forward import ModelForward
from composer_gradmatch.reuse.output_checks import OutputChecks, StaleError
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError

__all__ = ["CheckedCapture"]

#: How often a run captures anew because the model's own forward does something else than the captured one.
_RECAPTURES = 3


class CheckedCapture:
    """Makes forward passes that are compared with the model's own.

    Args:
        forward (ModelForward): The model's own forward.
        precision (Callable): Makes the context of the training step's precision.
        layer (OutputLayer, optional): The output layer, whose inputs are wanted.
        checks (OutputChecks): Compares the passes.
    """

    def __init__(
        self,
        forward: ModelForward,
        precision: Callable[[], AbstractContextManager[None]],
        layer: OutputLayer | None,
        checks: OutputChecks,
    ) -> None:
        self._forward = CapturedForward(forward.eager, layer, forward.by_inductor, forward.model)
        self._precision, self._checks = precision, checks
        self._recaptures = 0

    def make(self, minibatch: Minibatch) -> Pass:
        """Makes the pass over a minibatch, from the state of the model as it is.

        Raises:
            UnsupportedError: If it cannot be captured, or not be sliced.
        """
        try:
            with self._precision():
                return self._forward(minibatch.inputs(minibatch.batch), minibatch.num_samples)
        except UndecidedError:
            raise
        except UnsupportedError:
            if not self._forward.varies:
                raise
        # Perhaps it can where each length of sequences is captured by itself.
        self._forward.fix_sizes()
        minibatch.start.rewind()
        return self.make(minibatch)

    def make_checked(self, minibatch: Minibatch) -> Pass:
        """Makes the pass, compares it where that is due, and captures it anew if it is not what the model computes.

        Raises:
            UnsupportedError: As :meth:`make`; if layers mix samples; or if the model has too often computed something
                else than what was captured.
        """
        made = self.make(minibatch)
        try:
            self._checks.check(made, minibatch)
        except UndecidedError:
            pass
        except StaleError as error:
            self._recaptures += 1
            if self._recaptures > _RECAPTURES:
                raise UnsupportedError(
                    f"what its forward pass computes changes between steps by something that is not seen: {error}"
                ) from error
            del made  # The activations of two passes need not be held at once.
            self._forward.forget()
            minibatch.start.rewind()
            made = self.make(minibatch)
            self._checks.compare(made, minibatch)
        made.run.let_go_of_inputs()
        return made
