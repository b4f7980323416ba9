"""Gradient matching: the weighted samples whose mean gradient best matches the whole minibatch's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config
from composer.algorithms import LabelSmoothing
from composer.core import Algorithm, Event, Precision, State
from torch import nn

from composer_gradmatch.algorithms.schedule import Clock
from composer_gradmatch.algorithms.subset_backprop import Picks, WholeBatch
from composer_gradmatch.algorithms.two_pass_backprop import TwoPassBackprop
from composer_gradmatch.batches import copy_batch
from composer_gradmatch.forward.losses import LossFn, check_objective
from composer_gradmatch.forward.sample_checks import (
    Rows,
    check_independence,
    find_dependence_on_batch,
    normalised_by_running_statistics,
)
from composer_gradmatch.forward.traceless import Moment, check_scale_factor, no_trace, scale_inputs, unwrap
from composer_gradmatch.last_layer import OutputLayerTap, last_layer_gram, resolve_output_layer
from composer_gradmatch.last_layer.gradients import LayerGradients, gram_of_all
from composer_gradmatch.last_layer.output_layer import CheckedTap, observe_output_layer
from composer_gradmatch.matching import Solver, check_solver
from composer_gradmatch.matching.weighted_picks import Match, match_mean_gradient, match_on_device
from composer_gradmatch.spans import span

if TYPE_CHECKING:
    from composer_gradmatch.reuse.single_pass import SinglePass

__all__ = ["GradMatch", "observe_output_layer", "select_using_gradient_matching"]


def select_using_gradient_matching(
    input: torch.Tensor,
    target: torch.Tensor,
    model: nn.Module,
    loss_fun: Callable[..., torch.Tensor],
    keep: float = 0.5,
    scale_factor: float = 1.0,
    *,
    output_layer: str | nn.Module | None = None,
    solver: Solver = "omp",
    ridge: float = 0.0,
    tolerance: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prunes a minibatch to the weighted samples that match its mean gradient; twin of ``select_using_loss``.

    Runs the forward pass of Algorithm 1 and leaves no trace of it in the model. For a precision other than the
    default, call it in an autocast context.

    Args:
        input (torch.Tensor): Inputs, one row for each sample.
        target (torch.Tensor): Targets, one row for each sample.
        model (nn.Module): Called on the inputs.
        loss_fun (Callable): Called as ``loss_fun(outputs, target, reduction='none')``; losses of shape (M,), or
            with further dimensions of positions, over which they are summed.
        keep (float, optional): Fraction of the samples to keep, m = max(1, int(keep·M)). Default: ``0.5``.
        scale_factor (float, optional): Scale for downsampling the inputs of this pass, in (0, 1]. Default: ``1.0``.
        output_layer (str | nn.Module, optional): The output layer; found by itself if None. Default: ``None``.
        solver (str, optional): See :func:`.gram_omp`. Default: ``"omp"``.
        ridge (float, optional): See :func:`.gram_omp`. Default: ``0.0``.
        tolerance (float, optional): See :func:`.gram_omp`. Default: ``0.0``.

    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]: The picked inputs, their targets and their weights; the
        weights are on the inputs' device and sum to their number. All samples, with weights one, if ``keep`` is 1
        or the mean gradient is zero.

    Raises:
        TypeError: If ``loss_fun`` is no function that takes ``reduction``.
        ValueError: If an argument is out of range, lengths differ, the output layer is not found or no linear one, or
            the gradients are not finite.
    """
    _check_takes_reduction(loss_fun)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}.")
    check_scale_factor(scale_factor)
    check_solver(solver, ridge, tolerance)
    if len(input) != len(target) or not len(input):
        raise ValueError(
            f"input and target need the same number of samples, at least one; got {len(input)} and {len(target)}."
        )
    if keep == 1:
        return input, target, torch.ones(len(input), device=input.device)
    (scaled,) = scale_inputs((input,), 0, scale_factor)
    with no_trace(model):
        if output_layer is None:
            layer = observe_output_layer(model, scaled)
        else:
            layer = resolve_output_layer(model, output_layer)
        with CheckedTap(model, layer, output_layer is not None).open() as tap:
            losses = loss_fun(model(scaled), target, reduction="none")
            if losses.shape[:1] != input.shape[:1]:
                raise ValueError(f"loss_fun must return one loss a sample, got shape {tuple(losses.shape)}.")
            losses = losses.flatten(1).sum(1) if losses.dim() > 1 else losses
            inputs, grads = tap.inputs_and_grads(losses)
    if tap.warning is not None:
        warnings.warn(tap.warning, stacklevel=2)
    num_picks = max(1, int(keep * len(input)))
    gram = last_layer_gram(inputs.double(), grads.double(), layer.bias is not None)
    match = match_mean_gradient(gram, num_picks, solver=solver, ridge=ridge, tolerance=tolerance)
    if match is None:
        return input, target, torch.ones(len(input), device=input.device)
    indices = match.indices.to(input.device)
    return input[indices], target[indices.to(target.device)], match.weights.float().to(input.device)


def _check_takes_reduction(loss_fun: Callable[..., torch.Tensor]) -> None:
    """Raises unless a function can be called with ``reduction='none'``, as far as its signature tells."""
    remedy = "pass a function of (outputs, target, reduction='none'), F.cross_entropy for example."
    if not callable(loss_fun):
        raise TypeError(f"loss_fun must be a function, got {type(loss_fun).__name__}: {remedy}")
    try:
        parameters = inspect.signature(loss_fun.forward if isinstance(loss_fun, nn.Module) else loss_fun).parameters
    except ValueError:
        return  # A function of C's, which tells no signature.
    if "reduction" not in parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        raise TypeError(
            f"loss_fun takes no keyword argument 'reduction', so it cannot give the loss of each sample: {remedy}"
        )


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    module: Any = model
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


class GradMatch(TwoPassBackprop):
    """Backpropagates the weighted part of each minibatch whose mean gradient best matches the whole one's.

    Implements Balles, Archambeau and Zappella, "A Negative Result on Gradient Matching for Selective Backprop"
    (2023), whose finding is that this does not reliably beat random selection (:class:`.RandomBackprop`).

    On ``Event.AFTER_DATALOADER`` a forward pass gives the last linear layer's inputs and output gradients; their
    Gram matrix (eq. 4) goes to orthogonal matching pursuit (Algorithm 2), and the picked samples replace
    ``state.batch``. On ``Event.AFTER_LOSS`` the loss of each microbatch becomes L + (1/Z)·Σᵢ(wᵢ − 1)ℓᵢ: its samples
    weighted, its other terms as they were. The pass leaves the batch, buffers, parameters, modules' attributes and
    random number generators as they were. A minibatch whose last-layer gradients are not finite, or whose mean is
    zero, is trained whole.

    On a GPU, with ``solver="omp"`` and no tolerance, the host does not wait for the selection: there are always m
    picks, some of weight zero where matching pursuit stops early; and of a minibatch that cannot be matched m samples
    are trained with weights one. (Where the output layer runs at many positions of a sample, the host asks for their
    number.)

    The first seven parameters are those of Composer's ``SelectiveBackprop``.

    Args:
        start (float, optional): Start of selection as a fraction of training. Default: ``0.5``.
        end (float, optional): End of selection as a fraction of training. Default: ``0.9``.
        keep (float, optional): Fraction of the minibatch to keep, m = max(1, int(keep·M)). Default: ``0.5``.
        scale_factor (float, optional): Scale for downsampling the inputs of the selection pass, in (0, 1].
            Default: ``1.0``.
        interrupt (int, optional): Every ``interrupt``-th batch is trained whole; 0 selects from all.
            Default: ``2``.
        input_key (str | int | tuple[Callable, Callable] | Any, optional): Where a batch has its inputs.
            Default: ``0``.
        target_key (str | int | tuple[Callable, Callable] | Any, optional): Where a batch has its targets.
            Default: ``1``.
        output_layer (str | nn.Module, optional): The ``nn.Linear`` whose gradients stand for the model's: a dotted
            name or the module itself. ``None`` finds the one that put out what the model returns (its ``logits``, if
            it names them), or what that is made from by nothing learned. Its output must be its input times its
            weight plus its bias; where the loss goes through other parameters behind it, one that was found is an
            error, and one that was named a warning. Default: ``None``.
        loss_fn (Callable, optional): A function of (outputs, batch) that returns the loss of each sample, shape
            (M,). ``None`` asks the model's own ``loss(..., reduction='none')`` or, for a ``HuggingFaceModel``, takes
            the loss of its task from its logits and labels. Default: ``None``.
        solver (str, optional): ``"omp"``, the paper's Algorithm 2; ``"nonnegative"`` or ``"swap"``, variants of it;
            or ``"sklearn"``, which the paper's experiments ran: see :func:`.gram_omp`. Default: ``"omp"``.
        ridge (float, optional): A penalty on the weights, λ‖w‖² with λ relative to the mean squared norm of the
            samples' gradients, which makes them more even. Default: ``0.0``.
        tolerance (float, optional): Picks no more samples once the squared error of the match is at most this share
            of ‖ḡ‖², in [0, 1), so that the number of picks, at most m, adapts to the minibatch. That is the error of
            the least-squares weights, any ridge penalty included; clipped and normalised weights have a larger one,
            which is logged as ``matching_residual``. Default: ``0.0``.
        selection_microbatch_size (int | str, optional): Samples at a time in the selection pass: a number, ``"auto"``,
            or ``None`` for the training step's; see :class:`.TwoPassBackprop`. Default: ``None``.
        selection_precision (str | Precision, optional): The precision of the selection pass, e.g. ``"amp_bf16"``;
            ``None`` for the training step's. Default: ``None``.
        reuse_activations (bool, optional): Whether to make one forward pass instead of two; see
            :class:`.TwoPassBackprop`. Default: ``False``.
        clock (str, optional): ``"batch"`` counts batches within an epoch, too, for ``start`` and ``end``; see
            :class:`.SubsetBackprop`. Default: ``"duration"``.

    Raises:
        TypeError: At INIT, if the model's loss cannot give per-sample values.
        ValueError: If a value is out of range; at INIT, if ``output_layer`` names no linear layer; at the first
            batch, if the output layer or the batch's samples cannot be found, if rows are not samples, if losses
            depend on other samples or do not make the model's own loss, or if weights cannot reach their samples.

    Example:
        .. code-block:: python

            from composer_gradmatch import GradMatch, select_first

            trainer = Trainer(
                ...,
                algorithms=[GradMatch(start=0.0, end=1.0, keep=0.3, interrupt=0)],
                algorithm_passes=[select_first],
            )
    """

    log_name = "gradmatch"

    def __init__(
        self,
        start: float = 0.5,
        end: float = 0.9,
        keep: float = 0.5,
        scale_factor: float = 1.0,
        interrupt: int = 2,
        input_key: Any = 0,
        target_key: Any = 1,
        *,
        output_layer: str | nn.Module | None = None,
        loss_fn: LossFn | None = None,
        solver: Solver = "omp",
        ridge: float = 0.0,
        tolerance: float = 0.0,
        selection_microbatch_size: int | str | None = None,
        selection_precision: str | Precision | None = None,
        reuse_activations: bool = False,
        clock: Clock = "duration",
    ) -> None:
        super().__init__(
            start,
            end,
            keep,
            scale_factor,
            interrupt,
            input_key,
            target_key,
            loss_fn,
            selection_microbatch_size,
            selection_precision,
            reuse_activations,
            clock,
        )
        if output_layer is not None and not isinstance(output_layer, str | nn.Module):
            raise TypeError(f"output_layer must be a dotted name, a module or None, got {output_layer!r}.")
        check_solver(solver, ridge, tolerance)
        self.output_layer = output_layer
        self.solver: Solver = solver
        self.ridge, self.tolerance = ridge, tolerance

    def _reset_fit(self) -> None:
        super()._reset_fit()
        # Algorithms may have replaced modules since the last one.
        self._layer: nn.Linear | None = None
        self._layer_name: str | None = None
        self._sample_dim: int | None = None
        self._changed_in_place = False

    def _check_setup(self, state: State) -> None:
        super()._check_setup(state)
        model = unwrap(state.model)
        if self.output_layer is not None:
            resolve_output_layer(model, self.output_layer)
        elif not any(isinstance(module, nn.Linear) for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} has no nn.Linear, but GradMatch matches the gradients of a linear output "
                "layer. Use LossBackprop or RandomBackprop, which need none."
            )
        if not self.ordered_first:
            self._check_loss_order(state, LabelSmoothing)
        for other in state.algorithms:
            if getattr(other, "interpolate_loss", False) and self.keep < 1:
                raise ValueError(
                    f"{type(other).__name__}(interpolate_loss=True) adds an unweighted loss after GradMatch has "
                    "weighted its samples. Use interpolate_loss=False, which mixes the targets instead."
                )

    def _check_order(self, state: State) -> None:
        super()._check_order(state)
        if not self.ordered_first:
            self._check_loss_order(state, Algorithm)

    def _check_loss_order(self, state: State, kind: type[Algorithm]) -> None:
        """Raises if an algorithm of a kind would undo its change of the loss before the samples are weighted."""
        for other in self._earlier_after_events(state):
            if not isinstance(other, kind) or self.keep >= 1:
                continue
            if other.match(Event.BEFORE_LOSS, state) and other.match(Event.AFTER_LOSS, state):
                raise ValueError(
                    f"{type(other).__name__} changes the batch for the loss and puts it back on AFTER_LOSS, before "
                    "GradMatch weighs the samples' losses. List GradMatch after it, or add to the Trainer: "
                    "algorithm_passes=[composer_gradmatch.select_first]."
                )

    def _output_layer(self, state: State) -> nn.Linear:
        model = unwrap(state.model)
        if (
            self._layer is not None
            and self._layer_name is not None
            and _module_at(model, self._layer_name) is not self._layer
        ):
            self._layer = self._sample_dim = None  # It was replaced.
        if self._layer is None:
            if self.output_layer is not None:
                self._layer = resolve_output_layer(model, self.output_layer)
            else:
                batch, _ = self._few(state)
                with no_trace(model), self._precision(state):
                    self._layer = observe_output_layer(model, scale_inputs(batch, self.input_key, self.scale_factor))
            self._layer_name = next((name for name, each in model.named_modules() if each is self._layer), None)
        return self._layer

    weighs_samples = True
    _remedy_for_rows = (
        "Gradient matching needs the samples first, in the batch's order, in the inputs and the outputs of its output "
        "layer and in the losses. Pass another output_layer, or put them there; RandomBackprop looks at nothing."
    )

    def _tap(self, state: State, layer: nn.Linear) -> OutputLayerTap:
        """A tap of the output layer, the first of which checks it."""
        if self._sample_dim is None:
            return CheckedTap(unwrap(state.model), layer, self.output_layer is not None)
        return OutputLayerTap(layer, self._changed_in_place, self._sample_dim)

    def _learn(self, tap: OutputLayerTap) -> None:
        """Keeps what a tap has found, and says what it has to say."""
        self._sample_dim = tap.sample_dim
        if isinstance(tap, CheckedTap) and tap.warning is not None:
            self._warn_once(tap.warning)

    def _rehearse(self, state: State, num_samples: int, num_picks: int) -> None:
        # A compiled model's graph could otherwise not be kept for the second backward pass of a comparison.
        with torch._functorch.config.patch(donated_buffer=False):
            super()._rehearse(state, num_samples, num_picks)

    def _shows_rows(self, state: State, batch: Any, num_samples: int) -> bool:
        """Shows that the weighted loss is the model's own, its samples weighted: of all of them, and of parts."""
        parts = [torch.arange(num_samples)]
        if num_samples // 2 >= max(2, self._ghost_batch_size):
            parts += [torch.arange(num_samples // 2), torch.arange(num_samples // 2, num_samples)]
        if num_samples > 1 and state.device_train_microbatch_size == 1:
            parts += torch.arange(num_samples).split(1)[:4]
        for part in parts:
            self._check_objective(state, self._take(batch, part, num_samples), len(part))
        rows_of = self._rows_of(state, batch, num_samples)

        def losses_of(samples: torch.Tensor) -> dict[str, torch.Tensor]:
            rows = dict(rows_of(samples))
            del rows["its outputs' gradients"]
            return rows

        if find_dependence_on_batch(losses_of, num_samples) is not None:
            raise ValueError(
                "The loss of a sample depends on which other samples are in the batch (advantages normalised, or "
                "classes counted, within the loss), so that a subset's weighted losses do not stand for the "
                "minibatch's. Use RandomBackprop; or compute what depends on the whole minibatch before it is selected "
                "from, in the collate function, and keep it in the batch with a number for each sample."
            )
        return True

    def _check_objective(self, state: State, batch: Any, num_samples: int) -> None:
        model = unwrap(state.model)
        with (
            self._no_trace(state),
            normalised_by_running_statistics(model) if num_samples == 1 else nullcontext(),
            OutputLayerTap(self._output_layer(state), sample_dim=self._sample_dim).open() as tap,
        ):
            with self._precision(state):
                batch = scale_inputs(batch, self.input_key, self.scale_factor)
                outputs = self._outputs_of(model, batch)
                before = Moment.now(model)
                losses = self._losses_of(model, outputs, copy_batch(batch), num_samples)
                self._loss_leaves_traces |= not before.is_now()
                before.restore()
                own_loss: Any = model.loss(outputs, batch)  # type: ignore[operator]
            # Before the context puts back what these graphs have saved.
            check_objective(losses, own_loss, tap.leaf, self._scale)
            mixed = check_independence(losses, tap.leaf, self._sample_dim or 0) is not None
        if mixed:
            raise ValueError(
                "The loss of a sample depends on the outputs of other samples (a contrastive loss over the batch, or "
                "batch normalisation behind the output layer), so that a subset's weighted losses do not stand for the "
                "minibatch's. Use RandomBackprop; or pass as output_layer the last layer in front of what mixes the "
                "samples and, as loss_fn, a loss of each sample on its own."
            )

    def _look(self, state: State, num_samples: int, num_picks: int) -> None:
        self._match(state, num_samples, num_picks)

    def _rows_of(self, state: State, batch: Any, num_samples: int) -> Rows:
        layer = self._output_layer(state)

        def rows(samples: torch.Tensor) -> dict[str, torch.Tensor]:
            with (
                self._no_trace(state),
                normalised_by_running_statistics(unwrap(state.model)),
                OutputLayerTap(layer, sample_dim=self._sample_dim).open() as tap,
            ):
                _, losses = self._forward(state, self._take(batch, samples, num_samples), num_samples)
                inputs, grads = tap.inputs_and_grads(losses)
            return {"the output layer's inputs": inputs, "its outputs' gradients": grads, "the losses": losses.detach()}

        return rows

    def _match(self, state: State, num_samples: int, num_picks: int) -> Match | WholeBatch | None:
        layer = self._output_layer(state)

        def last_layer_gradients(batch: Any, n: int) -> LayerGradients:
            try:
                with self._tap(state, layer).open() as tap:
                    outputs, losses = self._forward(state, batch, n)
                    with span("output_gradients"):
                        inputs, grads = tap.inputs_and_grads(losses)
                    del outputs, losses  # And with them the graph of the loss, which holds copies of the output.
            except (RuntimeError, ValueError) as error:
                if self._changed_in_place or "used in an in-place operation" not in str(error):
                    raise
                self._changed_in_place = True
                return last_layer_gradients(batch, n)
            self._learn(tap)
            return LayerGradients.of(layer, inputs, grads, tap.outputs, num_samples)

        with self._no_trace(state):
            parts = self._in_microbatches(state, num_samples, last_layer_gradients)
        return self._match_parts(state, parts, num_picks)

    def _gradients_of_one_pass(self, state: State, num_samples: int) -> LayerGradients | None:
        """H and P of the step's only forward pass; None where two are made."""

        def visit(single: SinglePass, losses: torch.Tensor) -> LayerGradients:
            with span("output_gradients"):
                inputs, grads, outputs = (
                    rows.movedim(self._sample_dim or 0, 0) for rows in single.inputs_and_grads(losses)
                )
            return LayerGradients.of(self._output_layer(state), inputs, grads, outputs, num_samples)

        return self._once(state, num_samples, visit)

    def _watched_layer(self, state: State) -> nn.Linear | None:
        return self._output_layer(state)

    def _match_parts(self, state: State, parts: Sequence[LayerGradients], num_picks: int) -> Match | WholeBatch | None:
        layer = self._output_layer(state)
        with span("gram"):
            gram = gram_of_all(parts, layer)
        if self._stays_on_device(state):
            return match_on_device(gram, num_picks, ridge=self.ridge)
        if not all(part.finite for part in parts):
            return WholeBatch(
                "a minibatch has last-layer gradients that are not finite; it and others like it are trained whole."
            )
        return match_mean_gradient(gram, num_picks, solver=self.solver, ridge=self.ridge, tolerance=self.tolerance)

    def _stays_on_device(self, state: State) -> bool:
        """Whether the host need not know what is picked: the number of picks is fixed, and the solver a kernel."""
        return state.device.name == "gpu" and self.solver == "omp" and self.tolerance == 0

    def _select(self, state: State, num_samples: int, num_picks: int) -> Picks | WholeBatch:
        gradients = self._gradients_of_one_pass(state, num_samples)
        if gradients is None:
            match = self._match(state, num_samples, num_picks)
        else:
            match = self._match_parts(state, [gradients], num_picks)
        if match is None:
            return WholeBatch()
        if isinstance(match, WholeBatch):
            return match
        return Picks(match.indices, match.weights, match.metrics(num_samples), match.found)
