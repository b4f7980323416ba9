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

import copy
import random
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from composer import Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map_only

from composer_gradmatch.batches import copy_batch, copy_structure, find_rows, take_samples, tensor_leaves
from composer_gradmatch.forward.huggingface_losses import huggingface_losses
from composer_gradmatch.forward.losses import takes_loss_from_logits
from composer_gradmatch.forward.traceless import Generators
from composer_gradmatch.forward.traces import ModelTraces
from composer_gradmatch.reuse.batch_parts import lists_of_samples, without_lists
from composer_gradmatch.reuse.capture import CapturedForward, Pass
from composer_gradmatch.reuse.model_state import ModelState
from composer_gradmatch.reuse.spot_checks import SpotChecks
from composer_gradmatch.reuse.training_step import trainer_on_the_stack, uninstall_step
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError, first_line
from composer_gradmatch.reuse.verify import check_gradients, check_outputs, picks_normalised_by_all, rounded_parameters

__all__ = ["SinglePass"]

#: The samples' losses from a model's outputs and the batch.
Losses = Callable[[Any, Any], torch.Tensor]

#: The share of training's time that each kind of check may take.
_SHARE = 0.0025
#: How often a run captures anew because the model's own forward does something else than the captured one.
_RECAPTURES = 3
#: In how many steps in a row the pass may be made in vain.
_IN_VAIN = 3


class SinglePass:
    """Makes the forward pass over a minibatch, and serves the Trainer its picked rows.

    Args:
        model (nn.Module): A ComposerModel, out of any wrapper.
        precision (Callable): Makes the context of the training step's precision.
        layer (nn.Linear, optional): The output layer, whose inputs and outputs are wanted. Default: ``None``.
    """

    def __init__(
        self, model: nn.Module, precision: Callable[[], AbstractContextManager[None]], layer: nn.Linear | None = None
    ) -> None:
        self.release_model(model)
        self.model, self.precision, self.layer = model, precision, layer
        #: A HuggingFace model computes a loss in its forward pass, which is no sample's: it is added afterwards. Some
        #: compute none; whether this one does is known from the first minibatch on.
        self._adds_loss: bool | None = None if takes_loss_from_logits(model) else False
        forward: Any = model.forward
        compiler_config = getattr(forward, "get_compiler_config", None)
        #: The model's forward before it was compiled, by Inductor or another backend; None where it was not.
        self._uncompiled: Callable[[Any], Any] | None = getattr(forward, "_torchdynamo_orig_callable", None)
        by_inductor = compiler_config is not None and compiler_config() is not None
        self._captured_forward = CapturedForward(self._uncompiled or forward, layer, by_inductor)
        self._pass: Pass | None = None
        self._traces = ModelTraces(model)
        #: The generators before and after the forward pass.
        self._before = self._after = Generators.now()
        self._batch: Any = None
        self._num_samples = 0
        #: Whether the Trainer's forward is served from the pass.
        self.installed = False
        self._picked: Any = None
        self._picks = torch.empty(0, dtype=torch.int64)
        self._marks: list[Any] = []
        self._state: ModelState | None = None
        self._served: set[int] = set()
        self._others_came = self._checks_late = False
        self._outputs_check, self._layouts_check, self._late_check = (SpotChecks(_SHARE) for _ in range(3))
        self._gradients_check = SpotChecks(_SHARE, first=0, guess=3.0)
        self._recaptures = 0
        #: In how many steps in a row the Trainer's forward was the model's own, and why in the last.
        self._in_vain, self._why_in_vain = 0, ""
        self._trainer: Callable[[], Trainer | None] = lambda: None
        self._is_patched = False
        self._lists: frozenset[str] = frozenset()
        self._changed: str | None = None
        #: Whether a few samples can be run alone.
        self._runs_alone = True

    def __deepcopy__(self, memo: dict[int, Any]) -> SinglePass:
        """What a copy of the model that is made within a step has in its ``forward``: it is served nothing."""
        other: SinglePass = object.__new__(SinglePass)
        other.model, other._pass, other.installed = memo.get(id(self.model), self.model), None, False
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
        self._traces, self._before = ModelTraces(self.model), Generators.now()
        self._batch, self._num_samples = batch, num_samples
        self._lists = lists_of_samples(batch, num_samples)
        try:
            if self._adds_loss is None:
                self._adds_loss = self._computes_loss()
            self._pass = self._checked()
            self._after = Generators.now()
            self._state = ModelState(self.model) if self._state is None else self._state.renew()
            made = {id(output): output.detach() for output in self._pass.run.outputs}
            self.leaves = [leaf.requires_grad_() for leaf in made.values() if leaf.is_floating_point()]
            outputs = tree_map_only(torch.Tensor, lambda output: made[id(output)], self._pass.outputs)
            return self._completed(outputs, batch)
        except BaseException:
            self.release()
            self._traces.restore()
            self._rewind()
            raise

    @contextmanager
    def no_trace(self) -> Iterator[None]:
        """Puts back the buffers that the selection's losses change: the training step's own change them again."""
        assert self._state is not None
        restore = None
        if any(module._buffers and not isinstance(module, _BatchNorm) for module in self.model.modules()):
            restore = ModelTraces(self.model, attributes=False).restore_buffers
        yield
        if restore is not None and self._state.change() is not None:
            restore()
            self._state = self._state.renew()

    def inputs_and_grads(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """H, P and the outputs of the output layer in the pass, for the samples' losses, shape (M,).

        Raises:
            UnsupportedError: If the model does not return the output layer's output as it is, or the losses depend on
                something else that it returns.
        """
        assert self._pass is not None
        assert self.layer is not None
        inputs = self._pass.inputs
        assert inputs is not None
        graphs = self._pass.run.graphs
        if graphs.layer_output is None:
            if not all(bool(leaf.isfinite().all()) for leaf in self.leaves):
                raise UndecidedError("a minibatch has outputs that are not finite")
            graphs.layer_output = _position_of(self.layer, inputs, self.leaves)
        leaf = self.leaves[graphs.layer_output]
        if not losses.requires_grad:
            raise UnsupportedError("its losses do not depend on what it returns")
        grads = torch.autograd.grad(losses.sum(), self.leaves, allow_unused=True)
        if sum(grad is not None for grad in grads) != 1 or grads[graphs.layer_output] is None:
            raise UnsupportedError("its losses depend on other outputs than the output layer's")
        (grad,) = (grad for grad in grads if grad is not None)
        shape = (*inputs.shape[:-1], self.layer.out_features)
        return inputs, grad.reshape(shape), leaf.detach().reshape(shape)

    def serve(self, picks: torch.Tensor, picked: Any, weights: torch.Tensor | None, losses: Losses) -> None:
        """Serves the picks to the Trainer until :meth:`release`; verifies the pass, where that is due.

        Args:
            picks (torch.Tensor): The picked samples of the minibatch, int64, shape (m,).
            picked (Any): Their batch.
            weights (torch.Tensor, optional): Their weights, shape (m,); None for ones. Default: ``None``.
            losses (Callable): Samples' losses, for the verification.

        Raises:
            UndecidedError: If nothing can be compared on this minibatch; then the pass is as if it had not been, but
                for what has been drawn since.
            UnsupportedError: If the gradients are not those of the same picks; then, too.
        """
        assert self._pass is not None
        # In containers of its own: another algorithm may replace the items of the given ones.
        self._picked = copy_structure(picked)
        self._picks = picks.to(next(tensor_leaves(picked)).device)
        graphs = self._pass.run.graphs
        drawn = self._gradients_check.due()
        if graphs.steps + 1 >= graphs.verified_at or drawn:
            with self._gradients_check.measured():
                self._verify(torch.ones(len(picks)) if weights is None else weights, losses)
            if graphs.steps + 1 >= graphs.verified_at:
                graphs.postpone_verification()
            assert self._state is not None
            self._state = self._state.renew()
        graphs.steps += 1
        self._pass.run.num_picks = len(picks)
        self._marks = self._mark_picks()
        self._served, self._others_came, self._checks_late = set(), False, self._late_check.due()
        self._install()

    def _install(self) -> None:
        """Lets the model's ``forward`` be served while the Trainer makes the step, and at no other time.

        Composer has no event for a step that an error or an interrupt ends, so what makes the step puts it back.
        Without a Trainer on the stack it is served from now on.
        """
        self.installed = True
        trainer = self._trainer() or trainer_on_the_stack()
        if trainer is None:
            self._patch()
            return
        self._trainer = weakref.ref(trainer)
        uninstall_step(trainer)
        make_step = trainer._train_batch

        def served_step(*args: Any, **kwargs: Any) -> Any:
            if not self.installed:
                return make_step(*args, **kwargs)
            try:
                self._patch()
                return make_step(*args, **kwargs)
            finally:
                uninstall_step(trainer)
                self.release()

        served_step._of_single_pass = True  # type: ignore[attr-defined]
        trainer._train_batch = served_step  # type: ignore[method-assign]

    def _patch(self) -> None:
        self._own_forward, self._instances_forward = self.model.forward, vars(self.model).get("forward")
        self.model.forward = self._serve  # type: ignore[method-assign]
        self._is_patched = True

    @property
    def compile_failures(self) -> list[str]:
        """Why the pass's graphs run uncompiled, if the model is compiled and they could not be."""
        return [] if self._pass is None else self._pass.run.graphs.compile_failures()

    @property
    def missed(self) -> str | None:
        """Why the Trainer's forward was not served, if it was not."""
        if not self._others_came or len(self._served) == len(self._picks):
            return None
        return (
            "the samples that are trained on are not those that were picked: microbatch_transforms or another "
            "algorithm changes them after the selection"
        )

    def abandon(self) -> None:
        """Lets the pass be as if it had not been, but for what has been drawn since."""
        if self.pending:
            self.release()
            self._traces.restore()
            self._undo()

    def release(self) -> None:
        """Lets go of the activations, and of the model's ``forward``."""
        if self._is_patched:
            del self.model.forward
            if self._instances_forward is not None:
                self.model.forward = self._instances_forward
        self.installed = self._is_patched = False
        self._pass = self._picked = self._batch = None
        self.leaves: list[torch.Tensor] = []

    @staticmethod
    def release_model(model: nn.Module) -> None:
        """Gives a model its own ``forward`` back, where a step that an error has ended left it served."""
        owner = getattr(vars(model).get("forward"), "__self__", None)
        if isinstance(owner, SinglePass):
            owner.release()

    def _rewind(self) -> None:
        """Puts buffers and generators back to before the forward pass."""
        self._traces.restore_buffers()
        self._before.restore()

    def _undo(self) -> None:
        """Puts buffers back, and the generators unless a selection has drawn since: it would draw the same again."""
        self._traces.restore_buffers()
        if self._after.is_now():
            self._before.restore()

    def _capture(self) -> Pass:
        try:
            with self.precision():
                return self._captured_forward(self._inputs(self._batch), self._num_samples)
        except UndecidedError:
            raise
        except UnsupportedError:
            if not self._captured_forward.varies:
                raise
        # Perhaps it can where each length of sequences is captured by itself.
        self._captured_forward.fix_sizes()
        self._rewind()
        return self._capture()

    def _checked(self) -> Pass:
        """The pass, compared with the model's own forward where that is due, and captured anew if it is not that."""
        made = self._capture()
        try:
            self._spot_check(made)
        except UndecidedError:
            pass
        except _StaleError as error:
            self._recaptures += 1
            if self._recaptures > _RECAPTURES:
                raise UnsupportedError(
                    f"what its forward pass computes changes between steps by something that is not seen: {error}"
                ) from error
            made = None
            self._captured_forward.forget()
            self._rewind()
            made = self._capture()
            self._compare_outputs(made)
        made.run.let_go_of_inputs()
        return made

    def _spot_check(self, made: Pass) -> None:
        """Compares a pass with what the model itself does, as far as it is due in this step.

        Raises:
            _StaleError: If the model now computes something else.
            UnsupportedError: If layers mix samples, or nothing can be compared.
        """
        graphs = made.run.graphs
        layouts, outputs = self._layouts_check.due(), self._outputs_check.due()
        if (layouts or outputs) and not all(bool(value.isfinite().all()) for value in made.run.outputs):
            raise UndecidedError("a minibatch has outputs that are not finite")
        if layouts and graphs.steps:  # Of a new capture they have just been found.
            with self._layouts_check.measured():
                made.run.check_layouts()
        if outputs:
            with self._outputs_check.measured():
                self._compare_outputs(made)

    def _compare_outputs(self, made: Pass) -> None:
        """Compares the outputs of two samples with those of them alone.

        Those of all samples, with the same random numbers, where there are any, or batch normalisation.
        In low precision rounding may make more of a deep network: then the gradients are verified.

        Raises:
            _StaleError: If they differ.
            UnsupportedError: If they cannot be compared.
        """
        graphs = made.run.graphs
        rows = _two_samples(graphs.steps, self._num_samples)
        together = graphs.random or graphs.normalises or not self._runs_alone
        after, restore = Generators.now(), ModelTraces(self.model).restore
        inputs = self._inputs(self._batch)
        self._rewind()
        try:
            with torch.no_grad(), self.precision():
                own = self._own(inputs if together else take_samples(inputs, rows, self._num_samples))
        except Exception as error:
            if together:
                raise UnsupportedError(f"it could not be verified: {first_line(error)}") from error
            self._runs_alone = False
            return
        finally:
            after.restore()
            restore()
        expected = [leaf for leaf in tree_flatten(own)[0] if isinstance(leaf, torch.Tensor)]
        expected = list({id(leaf): leaf for leaf in expected}.values())
        found = [output if together else output[rows.to(output.device)] for output in made.run.outputs]
        try:
            if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
                raise UnsupportedError("the model itself returns other tensors than when it is captured")
            check_outputs(found, expected, "the model's own" + ("" if together else " on two samples alone"))
        except UndecidedError:
            raise
        except UnsupportedError as error:
            if any(value.dtype in (torch.float16, torch.bfloat16) for value in made.run.tensors()):
                graphs.verified_at = graphs.steps + 1
            else:
                raise _StaleError(str(error)) from error
        except Exception as error:
            raise UnsupportedError(f"it could not be verified: {first_line(error)}") from error

    def _inputs(self, batch: Any) -> Any:
        batch = without_lists(batch, self._lists)
        if not self._adds_loss:
            return batch
        batch = copy_structure(batch)
        batch.pop("labels", None)
        return batch

    def _computes_loss(self) -> bool:
        """Whether a HuggingFace model puts a loss into its outputs."""
        try:
            with torch.no_grad(), self.precision():
                outputs = self._own(copy_batch(self._batch))
        except Exception as error:
            raise UnsupportedError(f"it could not be run: {first_line(error)}") from error
        finally:
            self._rewind()
        if isinstance(outputs, Mapping):
            return outputs.get("loss") is not None
        return isinstance(outputs, tuple) and isinstance(outputs[0], torch.Tensor) and not outputs[0].dim()

    def _completed(self, outputs: Any, batch: Any) -> Any:
        """The outputs with the loss that a HuggingFace model would have put in."""
        if not self._adds_loss:
            return outputs
        is_tuple = isinstance(outputs, tuple)
        loss = huggingface_losses(self.model, (None, *outputs) if is_tuple else outputs, batch, reduction="mean")
        if is_tuple:
            return (loss, *outputs)
        if not isinstance(outputs, MutableMapping):
            raise UnsupportedError(f"it returns a {type(outputs).__name__}, which has no place for a loss")
        outputs = copy.copy(outputs)
        outputs["loss"] = loss
        return outputs

    def _serve(self, batch: Any) -> Any:
        """What stands in for the model's ``forward``."""
        if self._pass is None:
            return type(self.model).forward(self.model, batch)
        own_forward = self._own_forward
        try:
            rows = self._rows(batch)
            if rows is not None:
                assert self._pass is not None
                taken = rows.tolist()
                outputs = self._completed(self._pass.rows(self._picks[rows.to(self._picks.device)], taken), batch)
                self._served.update(taken)
                self._in_vain = 0
                return outputs
            if self._changed is not None and not self._served:
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
        as_they_were = self._state.as_they_were()
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers() if id(buffer) not in as_they_were]
        held = [(module, dict(module._buffers)) for module in self.model.modules()]
        self._undo()
        with torch.no_grad():
            for buffer, content in kept:
                buffer.copy_(content)
        for module, buffers in held:
            module._buffers.update(buffers)
        self.release()

    def _rows(self, batch: Any) -> torch.Tensor | None:
        assert self._pass is not None
        assert self._state is not None
        self._changed = None
        # Without gradients it is for another purpose. Of activations that are gone, memory ran out in the very last
        # backward pass, or the picks are wanted once more.
        if not torch.is_grad_enabled() or self._pass.run.spent:
            return None
        # Other weights (SAM's second pass), hooks of someone who wants to see what happens inside (ActivationMonitor).
        self._changed = self._state.change()
        if self._changed is None and not self._pass.holds():
            self._changed = "what its forward pass reads was changed"
        if self._changed is None and self._checks_late:
            self._checks_late = False
            self._check_late()
        if self._changed is not None:
            return None
        rows = None
        if self._marks == self._mark_picks():
            rows = find_rows(self._inputs(batch), self._inputs(self._picked), len(self._picks), self._pass.read)
        self._others_came |= rows is None
        return rows

    def _check_late(self) -> None:
        """Compares outputs once more when the Trainer asks for them, after all that a user may do before."""
        assert self._pass is not None
        assert self._state is not None
        try:
            with self._late_check.measured():
                self._compare_outputs(self._pass)
        except UndecidedError:
            pass
        except UnsupportedError:
            self._changed = "what its forward pass computes was changed"
        finally:
            self._state = self._state.renew()

    def _mark_picks(self) -> list[Any]:
        """What shows that a tensor of the picks that the forward pass reads was changed in place.

        On the CPU also its sum: what changes ``tensor.data`` counts no version.
        """
        assert self._pass is not None
        leaves = zip(tensor_leaves(self._inputs(self._picked)), self._pass.read, strict=True)
        return [
            (
                leaf._version,
                struct.pack("d", leaf.abs().sum() if leaf.is_complex() else leaf.sum())
                if leaf.device.type == "cpu"
                else None,
            )
            for leaf, is_read in leaves
            if is_read
        ]

    def _verify(self, weights: torch.Tensor, losses: Losses) -> None:
        """Compares outputs and gradients with the model's own, and makes the pass once more."""
        assert self._pass is not None
        drawn, graphs = Generators.now(), self._pass.run.graphs
        try:
            self._compare(weights, losses)
            self._rewind()
            self._pass = self._capture()
            self._pass.run.let_go_of_inputs()
            if self._pass.run.graphs is not graphs:
                raise UnsupportedError("it is captured anew whenever it runs: it changes Python values that it reads")
        except BaseException as error:
            self.release()
            drawn.restore()
            self._traces.restore()
            self._undo()
            if isinstance(error, UnsupportedError) or not isinstance(error, Exception):
                raise
            raise UnsupportedError(f"it could not be verified: {first_line(error)}") from error
        drawn.restore()

    def _compare(self, weights: torch.Tensor, losses: Losses) -> None:
        """Compares outputs and gradients with the model's own, which ends the pass.

        Where autocast to 16 bits makes them differ, as it does in deep networks, they are compared without it.
        """
        assert self._pass is not None
        device = self._picks.device.type
        with self.precision():
            by_autocast = torch.is_autocast_enabled(device)
        try:
            self._compare_in(self.precision, weights, losses)
            return
        except UnsupportedError as error:
            if not by_autocast or isinstance(error, UndecidedError):
                raise
        self._pass = None
        self._rewind()
        full = partial(torch.autocast, device, enabled=False)
        with full():
            forward = CapturedForward(self._uncompiled or self.model.forward)
            self._pass = forward(self._inputs(self._batch), self._num_samples)
        self._compare_in(full, weights, losses)

    def _compare_in(
        self, precision: Callable[[], AbstractContextManager[Any]], weights: torch.Tensor, losses: Losses
    ) -> None:
        """Compares outputs and gradients in a precision.

        The reference is the model's forward pass on the picks, as two passes would make it; on all samples where it
        draws random numbers, which would be others on the picks alone, or where batch normalisation mixes samples.
        """
        assert self._pass is not None
        captured, graphs, outputs = self._pass.run.outputs, self._pass.run.graphs, self._pass.outputs
        self._pass.run.let_go_of_inputs()
        low = any(value.dtype in (torch.float16, torch.bfloat16) for value in self._pass.run.tensors())
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def rows(outputs: Any) -> Any:
            return tree_map_only(torch.Tensor, lambda leaf: leaf.index_select(0, self._picks), outputs)

        def reference() -> tuple[Any, bool]:
            """What the model itself returns, and whether that is of the picks alone."""
            self._rewind()
            alone = not graphs.normalises and not graphs.random
            with nullcontext() if alone else picks_normalised_by_all(self._picks), precision():
                return self._own(self._inputs(self._picked if alone else self._batch)), alone

        def gradients(outputs: Any, alone: bool = True) -> tuple[torch.Tensor | None, ...]:
            with precision():
                picked = copy_batch(self._picked)
                each = losses(self._completed(outputs if alone else rows(outputs), picked), picked)
            # As the Trainer does, outside of autocast.
            return torch.autograd.grad((each * weights.to(each)).sum(), parameters, allow_unused=True)

        def rounded() -> tuple[torch.Tensor | None, ...]:
            with rounded_parameters(parameters, low):
                return gradients(*reference())

        with torch.enable_grad():
            found = gradients(self._pass.rows(self._picks))
            self._pass = None  # The activations of two forward passes need not be held at once.
            whole, alone = reference()
            own = [leaf for leaf in tree_flatten(whole)[0] if isinstance(leaf, torch.Tensor)]
            own = [leaf.detach() for leaf in {id(leaf): leaf for leaf in own}.values()]
            if len(own) != len(captured):
                raise UnsupportedError("the model itself returns other tensors than when it is captured")
            if alone:
                check_outputs(rows(captured), own, "that on the picks alone: layers mix samples, or run in another way")
            else:
                check_outputs(captured, own)
            expected = gradients(whole, alone)
            del whole, own
            check_gradients(found, expected, low, rounded)
            if self._adds_loss:
                with precision():
                    self._check_loss(outputs)

    def _own(self, batch: Any) -> Any:
        """What the model returns, uncompiled: Inductor draws other random numbers."""
        if self._uncompiled is not None:
            return self._uncompiled(batch)
        return self._own_forward(batch) if self._is_patched else self.model(batch)

    @torch.no_grad()
    def _check_loss(self, outputs: Any) -> None:
        """Compares the loss that is put into the outputs with the model's own."""
        self._rewind()
        whole, completed = self._own(copy_batch(self._batch)), self._completed(outputs, copy_batch(self._batch))
        key = "loss" if isinstance(whole, MutableMapping) else 0
        check_outputs([completed[key]], [whole[key]])


class _StaleError(UnsupportedError):
    """The captured forward pass is not what the model computes now."""


def _two_samples(step: int, num_samples: int) -> torch.Tensor:
    """Samples that are drawn for a step; two, because a model may squeeze a single one."""
    return torch.tensor(random.Random(step).sample(range(num_samples), min(2, num_samples)))


@torch.no_grad()
def _position_of(layer: nn.Linear, inputs: torch.Tensor, leaves: list[torch.Tensor]) -> int:
    """Which of a model's outputs holds what the output layer made of its inputs."""
    wide = inputs.double()
    outputs = nn.functional.linear(wide, layer.weight.to(wide), None if layer.bias is None else layer.bias.to(wide))
    found = []
    for i, leaf in enumerate(leaves):
        if leaf.numel() == outputs.numel():
            tolerance = 3e-2 if torch.bfloat16 in (leaf.dtype, inputs.dtype) else 3e-3
            error = (leaf.reshape(outputs.shape).double() - outputs).norm()
            if error <= tolerance * outputs.norm():
                found.append(i)
    if len(found) != 1:
        raise UnsupportedError("it does not return its output layer's output as it is")
    return found[0]
