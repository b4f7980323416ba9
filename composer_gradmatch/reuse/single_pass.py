"""One step with one forward pass: captured, verified where it is new, and put behind the model's own ``forward``."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from composer_gradmatch.batches import copy_structure, find_rows, tensor_leaves
from composer_gradmatch.huggingface_losses import huggingface_losses
from composer_gradmatch.losses import takes_loss_from_logits
from composer_gradmatch.reuse.capture import CapturedForward, Pass
from composer_gradmatch.reuse.unsupported import UnsupportedError
from composer_gradmatch.reuse.verify import check_gradients, check_outputs, picks_normalised_by_all
from composer_gradmatch.selection_pass import snapshot

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
        self.model, self.precision, self.layer = model, precision, layer
        #: A HuggingFace model computes a loss in its forward pass, which is no sample's: it is added afterwards.
        self._adds_loss = takes_loss_from_logits(model)
        self._captured_forward = CapturedForward(model.forward, layer)
        self._pass: Pass | None = None
        self._restore: Callable[[], None] = lambda: None
        self._batch: Any = None
        self._num_samples = 0
        #: Whether the Trainer's forward is served from the pass.
        self.installed = False
        #: Why the Trainer's forward could not be served, if it could not.
        self.missed: str | None = None
        self._picked: Any = None
        self._picks = torch.empty(0, dtype=torch.int64)
        self._versions: list[int] = []
        self._num_served = 0

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
        self._restore, self._batch, self._num_samples = snapshot(self.model), batch, num_samples
        try:
            self._pass = self._capture()
            flat, structure = tree_flatten(self._pass.outputs)
            self.leaves = [
                leaf.detach().requires_grad_(leaf.is_floating_point()) if isinstance(leaf, torch.Tensor) else leaf
                for leaf in flat
            ]
            return self._completed(tree_unflatten(self.leaves, structure), batch)
        except BaseException:
            self.release()
            self._restore()
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
        leaves = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        graphs = self._pass.run.graphs
        if graphs.layer_output is None:
            graphs.layer_output = _position_of(self.layer, inputs, leaves)
        leaf = leaves[graphs.layer_output]
        if not losses.requires_grad:
            raise UnsupportedError("its losses do not depend on what it returns")
        grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        if sum(grad is not None for grad in grads) != 1 or grads[graphs.layer_output] is None:
            raise UnsupportedError("its losses depend on other outputs than the output layer's")
        (grad,) = (grad for grad in grads if grad is not None)
        shape = (*inputs.shape[:-1], self.layer.out_features)
        return inputs, grad.reshape(shape), leaf.detach().reshape(shape)

    def serve(self, picks: torch.Tensor, picked: Any, weights: torch.Tensor | None, losses: Losses) -> None:
        """Verifies the pass, if its graphs are new, and serves the picks to the Trainer until :meth:`release`.

        Args:
            picks (torch.Tensor): The picked samples of the minibatch, int64, shape (m,).
            picked (Any): Their batch.
            weights (torch.Tensor, optional): Their weights, shape (m,); None for ones. Default: ``None``.
            losses (Callable): Samples' losses, for the verification.

        Raises:
            UndecidedError: If nothing can be compared on this minibatch; then the pass has left no trace.
            UnsupportedError: If the gradients are not those of the same picks; then, too.
        """
        assert self._pass is not None
        self._picked, self._picks = picked, picks.to(next(tensor_leaves(picked)).device)
        if not self._pass.run.graphs.verified:
            try:
                self._verify(torch.ones(len(picks)) if weights is None else weights, losses)
            except BaseException:
                self.release()
                self._restore()
                raise
            self._pass.run.graphs.verified = True
        self._versions = [leaf._version for leaf in tensor_leaves(picked)]
        self.missed, self._num_served = None, 0
        self._own_forward, self._instances_forward = self.model.forward, vars(self.model).get("forward")
        self.model.forward = self._serve  # type: ignore[method-assign]
        self.installed = True

    def abandon(self) -> None:
        """Lets the pass be as if it had not been."""
        if self.pending:
            self.release()
            self._restore()

    def release(self) -> None:
        """Lets go of the activations, and of the model's ``forward``."""
        if self.installed:
            del self.model.forward
            if self._instances_forward is not None:
                self.model.forward = self._instances_forward
        self.installed = False
        self._pass = self._picked = self._batch = None
        self.leaves: list[Any] = []

    def _capture(self) -> Pass:
        try:
            with self.precision():
                return self._captured_forward(self._inputs(self._batch), self._num_samples)
        except UnsupportedError:
            if not self._captured_forward.varies:
                raise
        # Perhaps it can where each length of sequences is captured by itself.
        self._captured_forward.varying = False
        self._restore()
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
        self._num_served += len(rows)
        return self._completed(self._pass.rows(self._picks[rows], self._num_served >= len(self._picks)), batch)

    def _rows(self, batch: Any) -> torch.Tensor | None:
        assert self._pass is not None
        run = self._pass.run
        if not torch.is_grad_enabled() or run.versions != [parameter._version for parameter in run.parameters]:
            return None  # Other weights (SAM's second pass), or another purpose.
        if run.spent:
            return None  # The microbatches are made once more, smaller, because memory ran out.
        inputs, picked = self._inputs(batch), self._inputs(self._picked)
        rows = None
        if self._versions == [leaf._version for leaf in tensor_leaves(self._picked)]:
            rows = find_rows(inputs, picked, len(self._picks), self._pass.read)
        if rows is None:
            self.missed = (
                "the samples that are trained on are not those that were picked: microbatch_transforms or another "
                "algorithm changes them after the selection"
            )
        return rows

    def _verify(self, weights: torch.Tensor, losses: Losses) -> None:
        """Compares outputs and gradients with the model's own, and makes the pass once more.

        The reference is the model's forward pass on the picks, as two passes would make it; on all samples where it
        draws random numbers, which would be others on the picks alone, or where batch normalisation mixes samples.
        """
        assert self._pass is not None
        captured, graphs, outputs = self._pass.run.outputs, self._pass.run.graphs, self._pass.outputs
        low = any(value.dtype in (torch.float16, torch.bfloat16) for value in self._pass.run.tensors())
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def gradients(outputs: Any) -> tuple[torch.Tensor | None, ...]:
            each = losses(self._completed(outputs, self._picked), self._picked)
            return torch.autograd.grad((each * weights.to(each)).sum(), parameters, allow_unused=True)

        def rows(outputs: Any) -> Any:
            return tree_map_only(torch.Tensor, lambda leaf: leaf.index_select(0, self._picks), outputs)

        with self.precision(), torch.enable_grad():
            found = gradients(self._pass.rows(self._picks))
            self._pass = None  # The activations of two forward passes need not be held at once.
            self._restore()
            with picks_normalised_by_all(self.model, self._picks) as mixed:
                alone = not mixed and not graphs.random
                reference = self.model(self._inputs(self._picked if alone else self._batch))
            own = [leaf.detach() for leaf in tree_flatten(reference)[0] if isinstance(leaf, torch.Tensor)]
            if len(own) != len(captured):
                raise UnsupportedError("the model itself returns other tensors than when it is captured")
            if alone:
                check_outputs(rows(captured), own, "that on the picks alone: layers mix samples, or run in another way")
            else:
                check_outputs(captured, own)
            check_gradients(found, gradients(reference if alone else rows(reference)), low)
            del reference, own
            if self._adds_loss:
                self._check_loss(outputs)
        self._restore()
        self._pass = self._capture()

    @torch.no_grad()
    def _check_loss(self, outputs: Any) -> None:
        """Compares the loss that is put into the outputs with the model's own."""
        self._restore()
        whole, completed = self.model(self._batch), self._completed(outputs, self._batch)
        key = "loss" if isinstance(whole, MutableMapping) else 0
        check_outputs([completed[key]], [whole[key]])


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
