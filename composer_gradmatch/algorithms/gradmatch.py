"""Gradient matching: the weighted samples whose mean gradient best matches the whole minibatch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from composer.core import Precision
from torch import nn

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.algorithms.schedule import Clock
from composer_gradmatch.forward.losses import LossFn
from composer_gradmatch.matching import Solver, WeightKind, check_solver, check_weight_kind
from composer_gradmatch.rules.table import RULES

__all__ = ["GradMatch"]


class GradMatch(RuleBackprop):
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

    Args:
        solver (str | Callable, optional): ``"omp"``, the paper's Algorithm 2; ``"nonnegative"`` or ``"swap"``,
            variants of it; ``"sklearn"``, which the paper's experiments ran; or a function of a :class:`.Problem`: see
            :func:`.gram_omp`. Default: ``"omp"``.
        ridge (float, optional): A penalty on the weights, λ‖w‖² with λ relative to the mean squared norm of the
            samples' gradients, which makes them more even. Default: ``0.0``.
        tolerance (float, optional): Picks no more samples once the squared error of the match is at most this share
            of ‖ḡ‖², in [0, 1), so that the number of picks, at most m, adapts to the minibatch. That is the error of
            the least-squares weights, any ridge penalty included; clipped and normalised weights have a larger one,
            which is logged as ``matching_residual``. Default: ``0.0``.
        weights (str, optional): ``"normalized"``, which sum to the number of picks (Algorithm 1). Where few samples
            carry the gradient, as late in training, the step along ḡ is then several times too long, which works as
            a higher learning rate: see the logged ``step_length``. ``"matched"`` takes the solver's own, times the
            number of picks: the step is as long as the match makes it, a little shorter than ḡ. Negative ones are
            clipped in both. Default: ``"normalized"``.

    All other arguments are those of :class:`.RuleBackprop`, the first seven of them also those of Composer's
    ``SelectiveBackprop``.

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

    log_name = RULES["gradmatch"].name

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
        weights: WeightKind = "normalized",
        selection_microbatch_size: int | str | None = None,
        selection_precision: str | Precision | None = None,
        reuse_activations: bool = False,
        clock: Clock = "duration",
        refresh: str | None = None,
        sample_id_key: Any = None,
        store_device: Literal["cpu", "gpu"] = "cpu",
        store_limit: float = 2.0,
        suspects: bool | Mapping[str, Any] = False,
    ) -> None:
        check_solver(solver, ridge, tolerance)
        check_weight_kind(weights)
        super().__init__(
            RULES["gradmatch"],
            start,
            end,
            keep,
            scale_factor,
            interrupt,
            input_key,
            target_key,
            output_layer=output_layer,
            loss_fn=loss_fn,
            selection_microbatch_size=selection_microbatch_size,
            selection_precision=selection_precision,
            reuse_activations=reuse_activations,
            clock=clock,
            refresh=refresh,
            sample_id_key=sample_id_key,
            store_device=store_device,
            store_limit=store_limit,
            suspects=suspects,
            options={"solver": solver, "ridge": ridge, "tolerance": tolerance, "weights": weights},
        )
        self.solver: Solver = solver
        self.ridge, self.tolerance = ridge, tolerance
        self.weights: WeightKind = weights
