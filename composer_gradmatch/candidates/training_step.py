"""What a training step itself shows of its samples: H and P by hooks on its own passes, at the cost of a copy."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import State

from composer_gradmatch.batches import copy_batch
from composer_gradmatch.candidates.two_passes import candidates_of
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.forward.compiled import is_compiled
from composer_gradmatch.forward.ranks import unwrap
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.forward.traceless import beside_training
from composer_gradmatch.last_layer import Watch
from composer_gradmatch.last_layer.gradients import LayerGradients
from composer_gradmatch.rules.candidates import Candidates

__all__ = ["TrainingStep"]


class _Microbatch:
    """What the output layer took and put out in one microbatch, and what the backward pass brought to it."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.inputs: torch.Tensor | None = None
        self.outputs: torch.Tensor | None = None
        self.grads: torch.Tensor | None = None
        self.losses: torch.Tensor | None = None
        #: Whether the layer ran more than once.
        self.twice = False

    def see_forward(self, inputs: Any, output: Any) -> Any:
        self.twice |= self.inputs is not None
        if self.twice or not isinstance(output, torch.Tensor) or not output.requires_grad:
            return None
        self.inputs, self.outputs = inputs.detach(), output.detach()
        output.register_hook(self._see_backward)
        return output  # So that the loss goes through what was seen.

    def _see_backward(self, grads: torch.Tensor) -> None:
        if self.grads is None:  # A closure may be run again.
            self.grads = grads.detach().clone()

    @property
    def is_whole(self) -> bool:
        return self.grads is not None and not self.twice


class TrainingStep:
    """Watches the microbatches of a training step whose samples all have the weight one.

    Gradients are those of the step's own loss, so P is theirs but for a factor that all samples share (the number of
    samples that the loss is a mean over, and a gradient scaler's). Of a compiled model, which a hook would compile
    anew, nothing is seen, nor where another algorithm hides the output layer.

    Args:
        selection_pass (SelectionPass): Knows the samples' losses.
        layer (WatchedLayer): The output layer.
        with_losses (bool, optional): Whether the samples' losses are asked for, too, which computes them once more from
            the step's outputs. Default: ``False``.
    """

    def __init__(self, selection_pass: SelectionPass, layer: WatchedLayer, with_losses: bool = False) -> None:
        self.selection_pass, self.layer, self.with_losses = selection_pass, layer, with_losses
        self._watch: Watch | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets a step."""
        self._close()
        self._microbatches: list[_Microbatch] = []

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    def before_forward(self, state: State, num_samples: int) -> None:
        """Begins to watch a microbatch of ``num_samples`` samples."""
        self._close()
        self._microbatches.append(_Microbatch(num_samples))
        if is_compiled(state.model):
            return
        self._watch = self.layer.of(state).watch(self._microbatches[-1].see_forward)
        self._watch.open()

    @torch.no_grad()
    def before_loss(self, state: State) -> None:
        """Lets go of the layer, whose forward pass the backward pass may make again."""
        self._close()
        if self.with_losses:
            now = self._microbatches[-1]
            batch = copy_batch(state.batch)
            with beside_training(unwrap(state.model)), self.selection_pass.precision(state):
                now.losses = self.selection_pass.losses_of(state, state.outputs, batch, now.num_samples).detach()

    def end(self, state: State, num_samples: int) -> Candidates | None:
        """Gives what was seen of the step's samples, and forgets it; None where that is not all of them.

        Args:
            state (State): After the backward pass.
            num_samples (int): How many there are.
        """
        seen: list[_Microbatch] = []
        for each in self._microbatches:
            if sum(other.num_samples for other in seen) < num_samples:
                seen.append(each)
        self.clear()
        if not all(each.is_whole for each in seen) or sum(each.num_samples for each in seen) != num_samples:
            return None
        layer, dim = self.layer.of(state), self.layer.sample_dim or 0
        parts = []
        for each in seen:
            assert each.inputs is not None
            assert each.grads is not None
            assert each.outputs is not None
            inputs, grads, outputs = (rows.movedim(dim, 0) for rows in (each.inputs, each.grads, each.outputs))
            if len(inputs) != each.num_samples:
                return None
            parts.append(LayerGradients.of(layer, inputs, grads, outputs, num_samples))
        losses = [each.losses for each in seen if each.losses is not None]
        nothing = torch.zeros(num_samples, device=parts[0].inputs.device)
        return candidates_of(num_samples, torch.cat(losses) if losses else nothing, parts, layer)
