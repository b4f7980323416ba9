"""Importance sampling: samples with large gradients, weighted to stay unbiased, where looking for them pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from composer.core import Precision
from torch import nn

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.algorithms.schedule import Clock
from composer_gradmatch.forward.losses import LossFn
from composer_gradmatch.rules.cost_switch import Switch
from composer_gradmatch.rules.importance import Score
from composer_gradmatch.rules.table import RULES

__all__ = ["ImportanceBackprop"]


class ImportanceBackprop(RuleBackprop):
    """Backpropagates samples drawn in proportion to their gradients' norms, with weights that keep the step unbiased.

    Inclusion probabilities are qᵢ = min(1, c·sᵢ) with Σq = m, drawn by systematic sampling, and weights n/(M·qᵢ),
    neither clipped nor normalised, so that (1/n)Σwᵢgᵢ has the mean ḡ in all layers (Alain et al., 2015; Katharopoulos
    and Fleuret, 2018; and, for q, Csiba and Richtárik, 2018).

    With ``switch="cost"`` a step looks only where that is predicted to leave less variance than a random subset of the
    same cost. A step that does not look trains such a subset, c·M samples (c: what a step that looks costs, by the
    model of a forward pass as a third), without a selection pass; what its own passes show of these decides on the
    next step. All ranks decide alike. Where a compiled model hides its output layer from hooks, steps that do not look
    show nothing, and each twentieth of them looks. With two passes and keep from 2/3 on, c is 1 or more: no look pays,
    and all minibatches but the first are trained whole, of which it warns. The host waits for a GPU in each step.

    Args:
        score (str, optional): What samples are drawn in proportion to: ``"gradient_norm"``, √Kᵢᵢ of the last layer;
            ``"output_gradient"``, ‖pᵢ‖ at its output; or ``"loss"``, √ℓᵢ, of losses that are not negative.
            Default: ``"gradient_norm"``.
        switch (str, optional): ``"cost"``, or ``"always"`` to look in every step, which it does with ``refresh``, where
            a look costs little. Default: ``"cost"``.

    All other arguments are those of :class:`.RuleBackprop`. Each step logs, beside what all do, ``looked``,
    ``share_of_steps_on`` and ``excess_variance``.

    Raises:
        ValueError: If a value is out of range; otherwise as :class:`.GradMatch`.

    Example:
        .. code-block:: python

            trainer = Trainer(
                ...,
                algorithms=[ImportanceBackprop(start=0.0, end=1.0, keep=0.3, interrupt=0)],
                algorithm_passes=[select_first],
            )
    """

    log_name = RULES["importance_backprop"].name

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
        score: Score = "gradient_norm",
        switch: Switch = "cost",
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
        if refresh is not None:
            switch = "always"  # A look costs little.
        rule = RULES["importance_backprop"]
        if score == "loss" and switch == "always":
            rule = replace(rule, needs="losses")  # The switch decides by gradients.
        super().__init__(
            rule,
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
            options={"score": score, "switch": switch},
        )
        self.score: Score = score
        self.switch: Switch = switch
