"""The first batch's rehearsal: showing, on a few samples, that rows are the samples and weights fit the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from composer.core import State

from composer_gradmatch.algorithms.loss_weighting import LossWeighting
from composer_gradmatch.batches import copy_batch, map_tensors, tensor_leaves
from composer_gradmatch.candidates.source import Source
from composer_gradmatch.forward.composer_private import ghost_batch_size
from composer_gradmatch.forward.ranks import unwrap
from composer_gradmatch.forward.sample_checks import (
    Rows,
    check_independence,
    check_rows,
    find_dependence_on_batch,
    normalised_by_running_statistics,
)
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.forward.traceless import Generators

__all__ = ["show_rows_and_objective"]

_OF_GRADIENTS = (
    "Gradient matching needs the samples first, in the batch's order, in the inputs and the outputs of its output "
    "layer and in the losses. Pass another output_layer, or put them there; RandomBackprop looks at nothing."
)
_OF_LOSSES = (
    "Selection needs the samples first, in the batch's order, in what the model returns and in its losses. Put "
    "them there, or use RandomBackprop, which looks at nothing."
)
_DEPENDENT = (
    "The loss of a sample depends on which other samples are in the batch (advantages normalised, or "
    "classes counted, within the loss), so that a subset's weighted losses do not stand for the "
    "minibatch's. Use RandomBackprop; or compute what depends on the whole minibatch before it is selected "
    "from, in the collate function, and keep it in the batch with a number for each sample."
)


def show_rows_and_objective(
    state: State, selection_pass: SelectionPass, source: Source, weighting: LossWeighting | None, at_layer: bool
) -> None:
    """Shows, on some samples of the batch, that row i of what is looked at is sample i's, and weights fit the loss.

    Args:
        state (State): On the first batch.
        selection_pass (SelectionPass): Makes the passes.
        source (Source): Looks.
        weighting (LossWeighting, optional): Weighs the loss; None for a rule that gives no weights.
        at_layer (bool): Whether it looks at the output layer.

    Raises:
        TypeError: If the model's own loss cannot be weighted.
        ValueError: If rows are not samples, or losses depend on other samples or do not make the model's own loss.
    """
    batch, few = selection_pass.few(state)
    rows_of = source.rows_of(state, batch, few)
    if weighting is not None:
        _show_objective(state, selection_pass, weighting, batch, few)
        evidence = _without_gradients(rows_of) if rows_of is not None and at_layer else None
        evidence = _outputs_and_losses(state, selection_pass, batch, few) if evidence is None else evidence
        if find_dependence_on_batch(evidence, few) is not None:
            raise ValueError(_DEPENDENT)
    elif rows_of is not None and _losses_are_mixed(state, selection_pass, batch, few):
        return  # Their rows show nothing.
    if rows_of is None and weighting is not None:
        rows_of = _losses(state, selection_pass, batch, few)  # Which are weighted, if not looked at.
    if rows_of is None:
        return
    with torch.no_grad(), selection_pass.no_trace(state):
        before = Generators.now()
        selection_pass.forward(state, copy_batch(batch), few)
        deterministic = before.is_now()
    check_rows(rows_of, few, deterministic, _OF_GRADIENTS if at_layer else _OF_LOSSES)


def _show_objective(
    state: State, selection_pass: SelectionPass, weighting: LossWeighting, batch: Any, num_samples: int
) -> None:
    """Shows that the weighted loss is the model's own, its samples weighted: of all of them, and of parts."""
    parts = [torch.arange(num_samples)]
    if num_samples // 2 >= max(2, ghost_batch_size(unwrap(state.model))):
        parts += [torch.arange(num_samples // 2), torch.arange(num_samples // 2, num_samples)]
    if num_samples > 1 and state.device_train_microbatch_size == 1:
        parts += torch.arange(num_samples).split(1)[:4]
    for part in parts:
        weighting.check(state, selection_pass.reader.copy_of(batch, part, num_samples), len(part))


def _without_gradients(rows_of: Rows) -> Rows:
    """Tells what is looked at, but for gradients, which depend on the number of samples."""

    def rows(samples: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {name: each for name, each in rows_of(samples).items() if name != "its outputs' gradients"}

    return rows


def _outputs_and_losses(state: State, selection_pass: SelectionPass, batch: Any, num_samples: int) -> Rows:
    """Tells what the model returns for each sample, and the samples' losses."""

    def rows(samples: torch.Tensor) -> Mapping[str, torch.Tensor]:
        with torch.no_grad(), selection_pass.no_trace(state), normalised_by_running_statistics(unwrap(state.model)):
            part = selection_pass.reader.copy_of(batch, samples, num_samples)
            outputs, losses = selection_pass.forward(state, part, num_samples)
        leaves = {str(i): leaf.detach() for i, leaf in enumerate(tensor_leaves(outputs))}
        outputs_of = {name: leaf for name, leaf in leaves.items() if leaf.shape[:1] == losses.shape}
        return {**outputs_of, "the losses": losses}

    return rows


def _losses(state: State, selection_pass: SelectionPass, batch: Any, num_samples: int) -> Rows:
    """Gives the samples' losses alone."""
    both = _outputs_and_losses(state, selection_pass, batch, num_samples)

    def rows(samples: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {"the losses": both(samples)["the losses"]}

    return rows


def _losses_are_mixed(state: State, selection_pass: SelectionPass, batch: Any, num_samples: int) -> bool:
    """Tells whether samples' losses depend on each other's outputs, of which it warns."""
    leaves = []

    def leaf_of(output: torch.Tensor) -> torch.Tensor:
        if not output.is_floating_point() or not output.dim() or len(output) != num_samples:
            return output
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # Which the loss may change in place.

    with selection_pass.no_trace(state):
        with torch.no_grad(), selection_pass.precision(state):
            batch = selection_pass.scaled(copy_batch(batch))
            outputs = selection_pass.outputs_of(state, batch)
        with torch.enable_grad(), selection_pass.precision(state):
            losses = selection_pass.losses_of(state, map_tensors(leaf_of, outputs), batch, num_samples)
        mixed = losses.requires_grad and any(check_independence(losses, leaf) is not None for leaf in leaves)
    if mixed:
        selection_pass.warn(
            "the loss of a sample depends on the other samples' outputs (as contrastive losses do): samples are "
            "ranked by their losses in the whole minibatch, and trained by those among the picks alone."
        )
    return mixed
