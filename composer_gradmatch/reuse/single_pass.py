"""One step with one forward pass: captured, verified where it is new, and put behind the model's own ``forward``.

What keeps a served step from being wrong, and what each check sees and costs:

- In each step, Dynamo's guards when the pass is made and again when the Trainer asks for it: all Python values, modules
  and hooks that the model's forward reads, class attributes and the environment included; and in between, the model's
  state (:class:`.ModelState`) and the picks' tensors. Microseconds; where they differ, the Trainer's forward is the
  model's own.
- In the first ten steps, and then at steps that are drawn, so often that it costs at most 0.25 % of training each: the
  outputs of two samples alone by the model itself, when the pass is made, and when the Trainer asks for it, which show
  numbers from elsewhere (a file, a C extension) and samples that are mixed; of the whole minibatch, with the same
  random numbers, where there are dropout or batch normalisation; and where samples lie in all saved tensors, which
  shows what mixes them, too. See :class:`.SpotChecks`.
- At the capture, at steps 100, 1000, 10,000, and at steps that are drawn, so often that it costs at most 0.25 % of
  training: the gradients of all parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from composer import Trainer
from torch import nn

from composer_gradmatch.batches import copy_batch, copy_structure, tensor_leaves
from composer_gradmatch.forward.modules import modules_of
from composer_gradmatch.forward.torch_private import BATCH_NORMS, tree_map_only
from composer_gradmatch.forward.traceless import Generators
from composer_gradmatch.forward.traces import ModelTraces
from composer_gradmatch.last_layer import OutputLayer
from composer_gradmatch.reuse.capture import Pass
from composer_gradmatch.reuse.checked_capture import CheckedCapture
from composer_gradmatch.reuse.loss_in_outputs import LossInOutputs
from composer_gradmatch.reuse.minibatch import Minibatch
from composer_gradmatch.reuse.model_forward import ModelForward
from composer_gradmatch.reuse.model_state import ModelState
from composer_gradmatch.reuse.output_checks import OutputChecks
from composer_gradmatch.reuse.output_layer import inputs_and_grads, saved_inputs_and_grads
from composer_gradmatch.reuse.served_picks import ServedPicks
from composer_gradmatch.reuse.spot_checks import SHARE, SpotChecks
from composer_gradmatch.reuse.training_step import put_around_step, trainer_on_the_stack
from composer_gradmatch.reuse.unsupported import UnsupportedError, first_line
from composer_gradmatch.reuse.verification import Losses, Verification

__all__ = ["SinglePass"]

#: In how many steps in a row the pass may be made in vain.
_IN_VAIN = 3


class SinglePass:
    """Makes the forward pass over a minibatch, and serves the Trainer its picked rows.

    Args:
        model (nn.Module): A ComposerModel, out of any wrapper.
        precision (Callable): Makes the context of the training step's precision.
        layer (OutputLayer, optional): The output layer, whose inputs and outputs are wanted. Default: ``None``.
    """

    def __init__(
        self, model: nn.Module, precision: Callable[[], AbstractContextManager[None]], layer: OutputLayer | None = None
    ) -> None:
        self.release_model(model)
        self.model, self.precision, self.layer = model, precision, layer
        self._forward, self._loss = ModelForward(model), LossInOutputs(model)
        self._checks = OutputChecks(self._forward, precision)
        self._capture = CheckedCapture(self._forward, precision, layer, self._checks)
        self._gradients_check = SpotChecks(SHARE, first=0, guess=3.0)
        self._minibatch: Minibatch | None = None
        self._pass: Pass | None = None
        #: What the model returned, as leaves of the losses' graph.
        self._leaves: list[torch.Tensor] = []
        self._state: ModelState | None = None
        #: Whether the Trainer's forward is served from the pass.
        self.installed = False
        self._picks: ServedPicks | None = None
        self._late_check_is_due = False
        #: What has changed since the selection, as the last call of the Trainer's forward has found.
        self._changed: str | None = None
        #: In how many steps in a row the Trainer's forward was the model's own, and why in the last.
        self._in_vain, self._why_in_vain = 0, ""
        self._trainer: Callable[[], Trainer | None] = lambda: None

    def __deepcopy__(self, memo: dict[int, Any]) -> SinglePass:
        """Tells what a copy of the model that is made within a step has in its ``forward``: it is served nothing."""
        other: SinglePass = object.__new__(SinglePass)
        other.model = memo.get(id(self.model), self.model)
        other._forward, other._pass, other.installed = ModelForward(other.model), None, False
        return other

    @property
    def pending(self) -> bool:
        """Whether there is a pass that no picks have been taken from."""
        return self._pass is not None and not self.installed

    def forward(self, batch: Any, num_samples: int) -> Any:
        """Runs the forward pass over all samples; each tensor that it returns is a leaf of the autograd graph.

        Args:
            batch (Any): The minibatch.
            num_samples (int): M.

        Returns:
            Any: What the model returns.

        Raises:
            UnsupportedError: If it cannot be captured, or not sliced; then it has left no trace.
        """
        if self._in_vain >= _IN_VAIN:
            raise UnsupportedError(self._why_in_vain)
        minibatch = self._minibatch = Minibatch(self.model, self._loss, batch, num_samples)
        try:
            self._loss.learn(partial(self._own_outputs, minibatch))
            self._pass = self._capture.make_checked(minibatch)
            minibatch.start.pass_is_over()
            self._state = ModelState(self.model) if self._state is None else self._state.renew()
            made = {id(output): output.detach() for output in self._pass.run.outputs}
            self._leaves = [leaf.requires_grad_() for leaf in made.values() if leaf.is_floating_point()]
            outputs = tree_map_only(torch.Tensor, lambda output: made[id(output)], self._pass.outputs)
            return self._loss.complete(outputs, batch)
        except BaseException:
            self.release()
            minibatch.start.restore()
            raise

    def _own_outputs(self, minibatch: Minibatch) -> Any:
        """Tells what the model itself returns for a minibatch; without a trace in buffers and generators."""
        try:
            with torch.no_grad(), self.precision():
                return self._forward.own(copy_batch(minibatch.batch))
        finally:
            minibatch.start.rewind()

    @contextmanager
    def no_trace(self) -> Iterator[None]:
        """Puts back the buffers that the selection's losses change: the training step's own change them again."""
        assert self._state is not None
        restore = None
        if any(module._buffers and not isinstance(module, BATCH_NORMS) for module in self.model.modules()):
            restore = ModelTraces(modules_of(self.model), attributes=False).restore_buffers
        yield
        if restore is not None and self._state.change() is not None:
            restore()
            self._state = self._state.renew()

    def inputs_and_grads(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes H, P and the outputs of the output layer in the pass, for the samples' losses, shape (M,).

        Raises:
            UnsupportedError: If the model does not return the output layer's output as it is, or the losses depend on
                something else that it returns.
        """
        assert self._pass is not None
        assert self.layer is not None
        return inputs_and_grads(self._pass, self.layer, self._leaves, losses)

    def saved_inputs_and_grads(
        self, losses: torch.Tensor
    ) -> tuple[OutputLayer, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Finds an output layer that was not watched: see :func:`.saved_inputs_and_grads`."""
        assert self._pass is not None
        return saved_inputs_and_grads(self._pass, self.model, self._leaves, losses)

    def serve(self, picks: torch.Tensor, picked: Any, weights: torch.Tensor | None, losses: Losses) -> None:
        """Serves the picks to the Trainer until :meth:`release`; verifies the pass, where that is due.

        Args:
            picks (torch.Tensor): The picked samples of the minibatch, int64, shape (m,).
            picked (Any): Their batch.
            weights (torch.Tensor, optional): Their weights, shape (m,); None for ones.
            losses (Callable): Samples' losses, for the verification.

        Raises:
            UndecidedError: If nothing can be compared on this minibatch; then the pass is as if it had not been, but
                for what has been drawn since.
            UnsupportedError: If the gradients are not those of the same picks; then, too.
        """
        assert self._minibatch is not None
        assert self._pass is not None
        # In containers of its own: another algorithm may replace the items of the given ones.
        picked = copy_structure(picked)
        picks = picks.to(next(tensor_leaves(picked)).device)
        graphs = self._pass.run.graphs
        drawn = self._gradients_check.due()
        if graphs.steps + 1 >= graphs.verified_at or drawn:
            with self._gradients_check.measured():
                weights = torch.ones(len(picks)) if weights is None else weights
                self._verify(
                    Verification(
                        self._forward, self.precision, self._loss, self._minibatch, picks, picked, weights, losses
                    )
                )
            if graphs.steps + 1 >= graphs.verified_at:
                graphs.postpone_verification()
            assert self._state is not None
            self._state = self._state.renew()
        graphs.steps += 1
        self._pass.run.num_picks = len(picks)
        self._picks = ServedPicks(picks, picked, self._minibatch.inputs, self._pass.read)
        self._late_check_is_due = self._checks.late_is_due()
        self._install()

    def _verify(self, verification: Verification) -> None:
        """Verifies the pass, and makes it once more, since it is used up by that."""
        assert self._pass is not None
        minibatch, graphs, drawn = verification.minibatch, self._pass.run.graphs, Generators.now()
        try:
            verification.compare(self._pass)
            self._pass = None
            minibatch.start.rewind()
            self._pass = self._capture.make(minibatch)
            self._pass.run.let_go_of_inputs()
            if self._pass.run.graphs is not graphs:
                raise UnsupportedError("it is captured anew whenever it runs: it changes Python values that it reads")
        except BaseException as error:
            self.release()
            drawn.restore()
            minibatch.start.undo()
            if isinstance(error, UnsupportedError) or not isinstance(error, Exception):
                raise
            raise UnsupportedError(f"it could not be verified: {first_line(error)}") from error
        drawn.restore()

    def _install(self) -> None:
        """Lets the model's ``forward`` be served while the Trainer makes the step, and at no other time.

        Without a Trainer on the stack it is served from now on.
        """
        self.installed = True
        trainer = self._trainer() or trainer_on_the_stack()
        if trainer is None:
            self._forward.replace(self._serve)
            return
        self._trainer = weakref.ref(trainer)
        put_around_step(trainer, lambda: self.installed, lambda: self._forward.replace(self._serve), self.release)

    @property
    def compile_failures(self) -> list[str]:
        """Why the pass's graphs run uncompiled, if the model is compiled and they could not be."""
        return [] if self._pass is None else self._pass.run.graphs.compile_failures()

    @property
    def missed(self) -> str | None:
        """Why the Trainer's forward was not served, if it was not."""
        return None if self._picks is None else self._picks.missed

    def abandon(self) -> None:
        """Lets the pass be as if it had not been, but for what has been drawn since."""
        if self.pending:
            assert self._minibatch is not None
            start = self._minibatch.start
            self.release()
            start.undo()

    def release(self) -> None:
        """Lets go of the activations, and of the model's ``forward``."""
        self._forward.put_back()
        self.installed = False
        self._pass = self._minibatch = None
        self._leaves = []
        if self._picks is not None:
            self._picks.let_go()

    @staticmethod
    def release_model(model: nn.Module) -> None:
        """Gives a model its own ``forward`` back, where a step that an error has ended left it served."""
        forward = vars(model).get("forward")
        if isinstance(forward, MethodType) and isinstance(forward.__self__, SinglePass):
            forward.__self__.release()

    def _serve(self, batch: Any) -> Any:
        """Stands in for the model's ``forward``."""
        own_forward = self._forward.replaced
        if self._pass is None or own_forward is None:
            return type(self.model).forward(self.model, batch)
        try:
            rows = self._rows(batch)
            assert self._picks is not None
            if rows is not None:
                assert self._pass is not None
                taken = rows.tolist()
                outputs = self._loss.complete(self._pass.rows(self._picks.samples(rows), taken), batch)
                self._picks.served.update(taken)
                self._in_vain = 0
                return outputs
            if self._changed is not None and not self._picks.served:
                self._withdraw(self._changed)
        except BaseException:
            if self._trainer() is None:
                self.release()
            raise
        return own_forward(batch)

    def _withdraw(self, why: str) -> None:
        """Lets this step be one of two passes, because of what changed since the selection."""
        self._in_vain, self._why_in_vain = self._in_vain + 1, f"{why} between the selection and the forward pass"
        assert self._state is not None
        assert self._minibatch is not None
        self._minibatch.start.undo_but_for_changes(self._state.as_they_were())
        self.release()

    def _rows(self, batch: Any) -> torch.Tensor | None:
        """Which of the picks a microbatch holds; None if it is not to be served, then of :attr:`_changed` if so."""
        assert self._pass is not None
        assert self._picks is not None
        # Without gradients it is for another purpose. Of activations that are gone, memory ran out in the very last
        # backward pass, or the picks are wanted once more.
        self._changed = None
        if not torch.is_grad_enabled() or self._pass.run.spent:
            return None
        self._changed = self._change()
        return None if self._changed is not None else self._picks.find(batch)

    def _change(self) -> str | None:
        """Tells what has changed since the selection, in words, as far as it is due to be found; None for nothing."""
        assert self._minibatch is not None
        assert self._pass is not None
        assert self._state is not None
        # Other weights (SAM's second pass), hooks of someone who wants to see what happens inside (ActivationMonitor).
        changed = self._state.change()
        if changed is not None:
            return changed
        if not self._pass.holds():
            return "what its forward pass reads was changed"
        if self._late_check_is_due:
            self._late_check_is_due = False
            try:
                if not self._checks.agrees_late(self._pass, self._minibatch):
                    return "what its forward pass computes was changed"
            finally:
                self._state = self._state.renew()
        return None
