"""One step with one forward pass: captured, verified where it is new, and put behind the model's own ``forward``."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only

from composer_gradmatch.batches import copy_structure, find_rows, tensor_leaves
from composer_gradmatch.huggingface_losses import huggingface_losses
from composer_gradmatch.losses import takes_loss_from_logits
from composer_gradmatch.reuse.capture import CapturedForward, Pass
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError, first_line
from composer_gradmatch.reuse.verify import check_gradients, check_outputs, picks_normalised_by_all, rounded_parameters
from composer_gradmatch.selection_pass import Generators
from composer_gradmatch.traces import remember_buffers

__all__ = ["SinglePass"]

#: The samples' losses from a model's outputs and the batch.
Losses = Callable[[Any, Any], torch.Tensor]


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
        #: A HuggingFace model computes a loss in its forward pass, which is no sample's: it is added afterwards.
        self._adds_loss = takes_loss_from_logits(model)
        forward: Any = model.forward
        compiler_config = getattr(forward, "get_compiler_config", None)
        #: The model's forward before it was compiled, by Inductor or another backend; None where it was not.
        self._uncompiled: Callable[[Any], Any] | None = getattr(forward, "_torchdynamo_orig_callable", None)
        by_inductor = compiler_config is not None and compiler_config() is not None
        self._captured_forward = CapturedForward(self._uncompiled or forward, layer, by_inductor)
        self._pass: Pass | None = None
        self._restore_buffers: Callable[[], None] = lambda: None
        #: The generators before and after the forward pass.
        self._before = self._after = Generators.now()
        self._batch: Any = None
        self._num_samples = 0
        #: Whether the Trainer's forward is served from the pass.
        self.installed = False
        self._picked: Any = None
        self._picks = torch.empty(0, dtype=torch.int64)
        self._versions: list[int] = []
        self._hooks: list[int] = []
        self._served: set[int] = set()
        self._others_came = False

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
        self._restore_buffers, self._before = remember_buffers(self.model), Generators.now()
        self._batch, self._num_samples = batch, num_samples
        try:
            self._pass = self._capture()
            self._after, self._hooks = Generators.now(), _hooks_inside(self.model)
            made = {id(output): output.detach() for output in self._pass.run.outputs}
            self.leaves = [leaf.requires_grad_() for leaf in made.values() if leaf.is_floating_point()]
            outputs = tree_map_only(torch.Tensor, lambda output: made[id(output)], self._pass.outputs)
            return self._completed(outputs, batch)
        except BaseException:
            self.release()
            self._rewind()
            raise

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
        self._picked, self._picks = picked, picks.to(next(tensor_leaves(picked)).device)
        graphs = self._pass.run.graphs
        if graphs.steps + 1 >= graphs.verified_at:
            self._verify(torch.ones(len(picks)) if weights is None else weights, losses)
            graphs.postpone_verification()
        graphs.steps += 1
        self._pass.run.num_picks = len(picks)
        self._versions = [leaf._version for leaf in tensor_leaves(picked)]
        self._served, self._others_came = set(), False
        self._own_forward, self._instances_forward = self.model.forward, vars(self.model).get("forward")
        self.model.forward = self._serve  # type: ignore[method-assign]
        self.installed = True

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
            self._undo()

    def release(self) -> None:
        """Lets go of the activations, and of the model's ``forward``."""
        if self.installed:
            del self.model.forward
            if self._instances_forward is not None:
                self.model.forward = self._instances_forward
        self.installed = False
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
        self._restore_buffers()
        self._before.restore()

    def _undo(self) -> None:
        """Puts buffers back, and the generators unless a selection has drawn since: it would draw the same again."""
        self._restore_buffers()
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

    def _inputs(self, batch: Any) -> Any:
        if not self._adds_loss:
            return batch
        batch = copy_structure(batch)
        batch.pop("labels", None)
        return batch

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
        rows = self._rows(batch)
        if rows is None:
            return self._own_forward(batch)
        assert self._pass is not None
        taken = rows.tolist()
        self._served.update(taken)
        return self._completed(self._pass.rows(self._picks[rows.to(self._picks.device)], taken), batch)

    def _rows(self, batch: Any) -> torch.Tensor | None:
        assert self._pass is not None
        run = self._pass.run
        if not torch.is_grad_enabled() or run.versions != [parameter._version for parameter in run.parameters]:
            return None  # Other weights (SAM's second pass), or another purpose.
        if run.spent:
            return None  # Memory ran out in the very last backward pass, or the picks are wanted once more.
        if _hooks_inside(self.model) != self._hooks:
            return None  # Someone wants to see what happens inside (ActivationMonitor).
        inputs, picked = self._inputs(batch), self._inputs(self._picked)
        rows = None
        if self._versions == [leaf._version for leaf in tensor_leaves(self._picked)]:
            rows = find_rows(inputs, picked, len(self._picks), self._pass.read)
        self._others_came |= rows is None
        return rows

    def _verify(self, weights: torch.Tensor, losses: Losses) -> None:
        """Compares outputs and gradients with the model's own, and makes the pass once more."""
        assert self._pass is not None
        drawn, graphs = Generators.now(), self._pass.run.graphs
        try:
            self._compare(weights, losses)
            self._rewind()
            self._pass = self._capture()
            if self._pass.run.graphs is not graphs:
                raise UnsupportedError("it is captured anew whenever it runs: it changes Python values that it reads")
        except BaseException as error:
            self.release()
            drawn.restore()
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
        captured, random, outputs = self._pass.run.outputs, self._pass.run.graphs.random, self._pass.outputs
        low = any(value.dtype in (torch.float16, torch.bfloat16) for value in self._pass.run.tensors())
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def rows(outputs: Any) -> Any:
            return tree_map_only(torch.Tensor, lambda leaf: leaf.index_select(0, self._picks), outputs)

        def reference() -> tuple[Any, bool]:
            """What the model itself returns, and whether that is of the picks alone."""
            self._rewind()
            with picks_normalised_by_all(self.model, self._picks) as mixed, precision():
                alone = not mixed and not random
                return self._own(self._inputs(self._picked if alone else self._batch)), alone

        def gradients(outputs: Any, alone: bool = True) -> tuple[torch.Tensor | None, ...]:
            with precision():
                each = losses(self._completed(outputs if alone else rows(outputs), self._picked), self._picked)
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
        return self.model(batch) if self._uncompiled is None else self._uncompiled(batch)

    @torch.no_grad()
    def _check_loss(self, outputs: Any) -> None:
        """Compares the loss that is put into the outputs with the model's own."""
        self._rewind()
        whole, completed = self._own(self._batch), self._completed(outputs, self._batch)
        key = "loss" if isinstance(whole, MutableMapping) else 0
        check_outputs([completed[key]], [whole[key]])


def _hooks_inside(model: nn.Module) -> list[int]:
    """The ids of the hooks of a model's submodules, which only a forward pass of its own calls."""
    return [
        hook
        for module in model.modules()
        if module is not model
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
        for hook in hooks
    ]


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
