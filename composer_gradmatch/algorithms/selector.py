"""A rule at work in a run: what it sees, what it picks, and what its picks need."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from composer.core import State
from composer.utils import dist

from composer_gradmatch.algorithms.loss_weighting import LossWeighting
from composer_gradmatch.algorithms.rehearsal import show_rows_and_objective
from composer_gradmatch.candidates.source import Source
from composer_gradmatch.candidates.stored import StoredLooks
from composer_gradmatch.candidates.training_step import TrainingStep
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.candidates.when_asked import WhenAsked
from composer_gradmatch.forward.losses import check_batch, check_losses
from composer_gradmatch.forward.ranks import unwrap
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.forward.torch_private import keeping_graphs
from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost import Passes, step_cost
from composer_gradmatch.rules.picks import Picks, WholeBatch, as_picks
from composer_gradmatch.rules.rule import Rule
from composer_gradmatch.rules.step_quality import StepQuality

__all__ = ["Selector"]

#: Of rules that do not look at gradients, each selection of this number is measured by them.
_EVERY = 10


class Selector:
    """Selects from a run's minibatches by a rule.

    Args:
        rule (Rule): The rule, its options given. One that ``decides`` in each step whether it ``looks`` is given more
            picks at the same cost where it does not, and is shown what their training step shows.
        source (Source): Gives its candidates.
        selection_pass (SelectionPass): Makes forward passes.
        layer (WatchedLayer, optional): The output layer; None if the rule needs no gradients.
        planned_passes (int): Forward passes of a step, if all goes well.

    Attributes:
        weighting (LossWeighting, optional): Brings weights into the loss; None for a rule that gives none.
    """

    def __init__(
        self,
        rule: Rule,
        source: Source,
        selection_pass: SelectionPass,
        layer: WatchedLayer | None,
        planned_passes: Passes,
    ) -> None:
        self.rule, self.source, self.selection_pass, self.layer = rule, source, selection_pass, layer
        self.planned_passes = planned_passes
        self.weighting = LossWeighting(selection_pass, layer) if rule.weighs else None
        self._function: Any = rule.function
        self._switched: WhenAsked | None = None
        self._training: TrainingStep | None = None
        self.store = source if isinstance(source, StoredLooks) else None
        if self.store is None and getattr(self._function, "decides", False) and layer is not None:
            self.source = self._switched = WhenAsked(source, lambda: self._function.looks, planned_passes)
            self._training = TrainingStep(selection_pass, layer, getattr(self._function, "reads_losses", True))
        #: The samples of a step that is watched, whose number is known once it has been selected for.
        self._watched: int | None = None
        #: The samples of the minibatch that were not even candidates; None for none.
        self.left_out: torch.Tensor | None = None
        self._quality = StepQuality()
        #: Selections since K was last computed for the quality alone.
        self._unmeasured = 0

    @property
    def looks(self) -> bool:
        """Whether it makes forward passes of its own."""
        return self.rule.needs != "nothing" or self.store is not None

    @property
    def needs_losses(self) -> bool:
        """Whether the samples' losses are looked at or weighted."""
        return self.looks or self.weighting is not None

    @property
    def rehearsed(self) -> bool:
        """Whether the first batch has shown that selection works."""
        return self.selection_pass.rehearsed

    def share(self, keep: float) -> float:
        """Tells which share of the next minibatch to train on: more than ``keep`` where it is not looked at.

        Args:
            keep (float): m/M, of steps that look.
        """
        if self._switched is None or self._function.looks:
            return keep
        return min(1.0, self._cost_of_a_look(keep))

    def _cost_of_a_look(self, keep: float) -> float:
        assert self._switched is not None
        return step_cost(self._switched.passes_of_a_look, keep)

    @property
    def decides(self) -> bool:
        """Whether :meth:`end_step` is to be called after each step that the schedule selects for."""
        return self._switched is not None or self.store is not None

    @property
    def leaves_out(self) -> bool:
        """Whether there may be samples that are not even candidates, so that all the others are a selection, too."""
        return self.store is not None and self.store.suspects is not None

    def selects(self, keep: float) -> bool:
        """Tells whether there is anything to select.

        Args:
            keep (float): The most to train on.
        """
        return keep < 1 or self.leaves_out or self.rule.varies

    @property
    def watches(self) -> bool:
        """Whether the step's microbatches are to be shown by :meth:`see_forward` and :meth:`see_loss`."""
        return self._watched is not None

    def begin_step(self, num_samples: int) -> None:
        """Begins to watch the step's microbatches, if their minibatch was not looked at.

        Args:
            num_samples (int): The samples of the step.
        """
        if self._training is not None:
            self._training.clear()
            self._watched = None if self._function.looks else num_samples
        elif self.store is not None:
            self._watched = num_samples

    def see_forward(self, state: State, num_samples: int) -> None:
        """Sees a microbatch before its forward pass.

        Args:
            state (State): The run's state.
            num_samples (int): How many samples it has.
        """
        if self.store is not None:
            self.store.see_forward(state)
        else:
            assert self._training is not None
            self._training.before_forward(state, num_samples)

    def see_loss(self, state: State, rows: Callable[[], torch.Tensor | None]) -> None:
        """Sees a microbatch before its loss, and after what other algorithms have made of it before its forward pass.

        Args:
            state (State): The run's state.
            rows (Callable): Tells which samples of the minibatch it has; None if they are not as they were.
        """
        if self.store is not None:
            self.store.see_loss(state, rows())
        else:
            assert self._training is not None
            self._training.before_loss(state)

    def end_step(self, state: State, keep: float) -> None:
        """Lets the rule decide whether to look at the next minibatch, on all ranks alike.

        Args:
            state (State): After the step.
            keep (float): m/M, of steps that look.
        """
        if self.store is not None:
            self._watched = None
            self.store.share(state)
            return
        assert self._training is not None
        if self._watched is not None:
            candidates = self._training.end(state, self._watched)
            if candidates is not None and candidates.finite:
                self._function.see_training(candidates, keep)
            self._watched = None
        findings = self._function.findings()
        if dist.get_world_size() > 1:
            sums = state.device.tensor_to_device(torch.tensor(findings, dtype=torch.float64))
            dist.all_reduce(sums, reduce_operation="SUM")
            findings = tuple(sums.tolist())
        cost = self._cost_of_a_look(keep)
        if cost >= 1 and self.planned_passes < 2:  # One pass was planned, but two were made.
            self.selection_pass.warn(self._remark_on_cost(keep))
        self._function.decide(findings, cost)

    def cost(self, share: float) -> float:
        """Tells what the step that was selected for costs: see :func:`.step_cost`."""
        return self.source.cost(share)

    def reset(self) -> None:
        """Forgets what belongs to one Trainer."""
        self.selection_pass.reset()
        self._quality.reset()
        self._unmeasured = 0
        if self.store is not None:
            self.store.reset()
        if self.weighting is not None:
            self.weighting.reset()
        if hasattr(self._function, "reset"):
            self._function.reset()

    def reset_fit(self, state: State) -> None:
        """Forgets what belongs to one ``fit``, in which modules may be replaced."""
        self.selection_pass.reset_fit()
        self.source.reset_fit(state)
        self._watched = None
        if self._training is not None:
            self._training.clear()
        for part in (self.layer, self.weighting):
            if part is not None:
                part.reset_fit()

    def state_dict(self, of_all_ranks: bool = True) -> dict[str, Any]:
        """Tells what a checkpoint keeps; of the rule, the state on each rank, since Composer saves that of rank 0.

        Args:
            of_all_ranks (bool, optional): If not, this rank's stands for that of each, and none waits for another.
                Default: ``True``.
        """
        state: dict[str, Any] = {} if self.weighting is None else {"loss_scale": self.weighting.state_dict()}
        if hasattr(self._function, "state_dict") and (own := self._function.state_dict()):
            state["rule"] = dist.all_gather_object(own) if of_all_ranks else [own] * dist.get_world_size()
        if self.store is not None:
            state["store"] = self.store.state_dict()
        return {**state, "step_quality": self._quality.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        if self.weighting is not None:
            self.weighting.load_state_dict(state.get("loss_scale", {}))
        self._quality.load_state_dict(state.get("step_quality", {}))
        if self.store is not None:
            self.store.load_state_dict(state.get("store", {}))
        of_ranks = state.get("rule", [])
        if dist.get_global_rank() < len(of_ranks) and hasattr(self._function, "load_state_dict"):
            self._function.load_state_dict(of_ranks[dist.get_global_rank()])

    def check_setup(self, state: State, keep: float) -> None:
        """Raises at INIT if a model's losses or output layer are not to be had.

        Args:
            state (State): The run's state.
            keep (float): The share to keep.

        Raises:
            TypeError: If the model's loss cannot give per-sample values.
            ValueError: If it has no output layer as asked for.
        """
        model = unwrap(state.model)
        if self.needs_losses and self.selection_pass.loss_fn is None:
            check_losses(model)
        if self.planned_passes == 2 and keep >= 2 / 3 and (keep < 1 or self.rule.varies):
            warnings.warn(f"{self.selection_pass.owner} {self._remark_on_cost(keep)}", stacklevel=2)
        if self.layer is not None:
            self.layer.check(model)

    def _remark_on_cost(self, keep: float) -> str:
        """Says what becomes of two passes and as many samples."""
        if self.rule.varies:
            return (
                f"with keep={keep} trains as many samples as its rule says, after a selection pass of M/3: it saves "
                "time only where less than 2/3 of the minibatch is left. With refresh most looks cost nothing."
            )
        said = (
            f"with keep={keep} costs more than training on everything: a selection pass of M/3 and a step on m samples "
            f"against M is {1 / 3 + keep:.2f}. Only below keep=2/3 does it save time."
        )
        if self._switched is None:
            return said
        return said + (
            " So with switch='cost' no minibatch after the first is looked at, and all of them are trained whole. "
            "Lower keep, or give refresh, reuse_activations=True or switch='always'."
        )

    def check_first_batch(self, state: State) -> None:
        """Raises if a batch's labels cannot be trained on, as far as the model tells."""
        if self.needs_losses:
            check_batch(unwrap(state.model), state.batch, self.selection_pass.loss_fn)

    def rehearse(self, state: State, num_samples: int, num_picks: int) -> None:
        """Does what a step will do, sees what it changes, and shows that rows and weights are the samples'.

        Raises:
            TypeError: If the model's loss cannot be weighted.
            ValueError: If rows are not samples, or losses depend on other samples or do not make the model's own.
        """
        # A compiled model's graph could otherwise not be kept for the second backward pass of a comparison.
        with keeping_graphs() if self.layer is not None else nullcontext():
            with self.selection_pass.watched(state) if self.needs_losses else nullcontext():
                self._rehearse_rule(self.source.rehearse(state, num_samples), num_picks)
                if self.needs_losses and not self.looks:
                    self.selection_pass.forward_few(state)
            if self.needs_losses:
                show_rows_and_objective(
                    state, self.selection_pass, self.source, self.weighting, at_layer=self.layer is not None
                )
        self.selection_pass.rehearsed = True

    def _rehearse_rule(self, candidates: Candidates, num_picks: int) -> None:
        before = self._function.state_dict() if hasattr(self._function, "state_dict") else None
        if before is not None:
            self._function.reset()
        self._pick(candidates, num_picks)
        if before is not None:
            self._function.reset()
            self._function.load_state_dict(before)

    def select(self, state: State, num_samples: int, num_picks: int) -> Picks | WholeBatch:
        """Picks ``num_picks`` of the ``num_samples`` samples of ``state.batch``."""
        candidates = self.source.look(state, num_samples)
        left, self.left_out = candidates.num_samples, None
        if candidates.rows is not None:
            is_left = torch.zeros(num_samples, dtype=torch.bool)
            is_left[candidates.rows] = True
            self.left_out = (~is_left).nonzero().flatten()
        if num_picks == num_samples:
            num_picks = left
        if left < num_picks or not left:
            return WholeBatch()  # Too many of them are left out.
        picks = self._pick(candidates, num_picks)
        if isinstance(picks, WholeBatch):
            return picks
        measured = self.source.metrics
        if len(picks.indices) < left and candidates.has_gram and self._measures():
            measured = {**measured, **self._quality.see(candidates.gram, picks)}
        if candidates.rows is not None:
            picks = replace(picks, indices=candidates.rows[picks.indices.cpu()])
        return replace(picks, metrics={**picks.metrics, **measured}) if measured else picks

    def _measures(self) -> bool:
        """Tells whether to compute K for the step's quality: always if the rule does, else in each tenth selection.

        Beside looks at losses alone there is one only when it is time.
        """
        if self.store is None or self.layer is None or self.rule.needs == "gradients":
            return True
        self._unmeasured = (self._unmeasured + 1) % _EVERY
        return not self._unmeasured

    def _pick(self, candidates: Candidates, num_picks: int) -> Picks | WholeBatch:
        blind = self.rule.needs == "nothing"
        if not blind and not self.rule.takes_not_finite and not candidates.finite:
            what = "losses" if self.layer is None else "losses or last-layer gradients"
            return WholeBatch(f"a minibatch has {what} that are not finite; it and others like it are trained whole.")
        result = self._function(candidates, num_picks)
        return as_picks(result, candidates.num_samples, self.rule.name, self.rule.weighs)
