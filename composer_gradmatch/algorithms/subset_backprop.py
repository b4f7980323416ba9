"""The shell around a selection: when it is made, how the batch becomes that of the picks, weights and metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from composer.algorithms import LabelSmoothing
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.models import ComposerModel

from composer_gradmatch.algorithms import beginning
from composer_gradmatch.algorithms.apart import check_apart, selects_now
from composer_gradmatch.algorithms.copies import CopiedByArguments
from composer_gradmatch.algorithms.namesakes import namesakes_of, of_each, own_state
from composer_gradmatch.algorithms.order import check_order, check_order_of_losses, check_unweighted_losses
from composer_gradmatch.algorithms.other_algorithms import activate_training_weights
from composer_gradmatch.algorithms.ranks_in_step import RanksInStep, on_all_ranks
from composer_gradmatch.algorithms.row_weights import RowWeights
from composer_gradmatch.algorithms.schedule import Clock, check_schedule, is_scheduled, remark_on_epochs
from composer_gradmatch.algorithms.selector import Selector
from composer_gradmatch.algorithms.step_log import StepLog, metrics_of
from composer_gradmatch.algorithms.warn_once import WarnOnce
from composer_gradmatch.batches import take_samples
from composer_gradmatch.batches.reader import BatchReader
from composer_gradmatch.batches.sample_numbers import without_numbers
from composer_gradmatch.forward.ranks import needs_all_ranks, unwrap
from composer_gradmatch.forward.traceless import no_trace
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.spans import span

if TYPE_CHECKING:
    from composer_gradmatch.candidates.one_pass import SinglePass

__all__ = ["SubsetBackprop"]


class SubsetBackprop(CopiedByArguments):
    """Backpropagates a part of each minibatch, picked on ``Event.AFTER_DATALOADER``; the base of our algorithms.

    On the very first batch the selection is rehearsed, and its result thrown away, if the schedule starts
    later: what cannot work fails in the first minute, not when selection begins.

    Args:
        start (float): Start of selection as a fraction of training.
        end (float): End of selection as a fraction of training.
        keep (float): Fraction of the minibatch to keep, m = max(1, int(keep·M)).
        interrupt (int): Every ``interrupt``-th batch is trained whole; 0 selects from all.
        input_key (str | int | tuple[Callable, Callable] | Any): Where a batch has its inputs: a key or a
            pair of getter and setter.
        target_key (str | int | tuple[Callable, Callable] | Any): The same for its targets.
        clock (str): What ``start`` and ``end`` are fractions of: ``"duration"`` counts in the unit of
            ``max_duration``, which in epochs are whole ones, as Composer's own algorithm does; ``"batch"`` counts
            batches within an epoch, too.
        log_name (str): The prefix of the logged metrics.

    Attributes:
        last_selection (Picks, optional): The picks of the last minibatch that was selected from: indices, weights
            and metrics; None if that was trained whole.
        minibatch (Any, optional): What the picks were taken from, during their step; None at all other times.
        batches_trained_whole (int): How many could not be selected from.

    Raises:
        ValueError: If a value is out of range.
    """

    #: Tells :func:`.select_first` that this algorithm comes first.
    selects_samples: ClassVar[bool] = True
    #: What selects, which a subclass makes once its arguments are checked.
    selector: Selector

    def __init__(
        self,
        start: float,
        end: float,
        keep: float,
        interrupt: int,
        input_key: Any,
        target_key: Any,
        clock: Clock,
        log_name: str,
    ) -> None:
        check_schedule(start, end, keep, interrupt, clock)
        self.start, self.end, self.keep, self.interrupt = start, end, keep, interrupt
        self.input_key, self.target_key = input_key, target_key
        self.clock: Clock = clock
        self.log_name = log_name
        #: Set by the algorithm pass :func:`.select_first`, which takes care of the order of algorithms; of one event.
        self.ordered_first = False
        self.batches_trained_whole = 0
        self.last_selection: Picks | None = None
        self.minibatch: Any = None
        self._owner = type(self).__name__
        self._warn_once = WarnOnce(self._owner)
        self._reader = BatchReader(input_key, target_key)
        self._rows = RowWeights(self._reader, self._warn_once, self._owner)
        self._ranks = RanksInStep()
        self._steps = StepLog(log_name, self._warn_once)
        #: Whether the batch is to be selected from, and whether what its step shows is to be decided on.
        self._scheduled = self._decides = False
        #: The Trainer's algorithms of this class, if there are several.
        self._namesakes: list[SubsetBackprop] = []
        #: Whether the data are numbered, and which batch was begun.
        self._is_numbered, self._begun = False, -1

    @property
    def batches_not_matched(self) -> int:
        """How many minibatches a GPU found to have no mean gradient to match."""
        return self._steps.not_matched

    def _reset(self, state: State) -> None:
        """Forgets what belongs to one Trainer."""
        self.batches_trained_whole, self.last_selection = 0, None
        for part in (self._warn_once, self._reader, self._steps, self.selector):
            part.reset()
        self._reset_fit(state)

    def _reset_fit(self, state: State) -> None:
        """Forgets what belongs to one ``fit``, in which modules may be replaced."""
        self._steps.drop()
        self._decides, self.minibatch = False, None
        self._rows.reset_fit()
        self._ranks.reset_fit()
        self.selector.reset_fit(state)

    def state_dict(self) -> dict[str, Any]:
        """Tells what a checkpoint keeps of the algorithm."""
        if self._namesakes and self._namesakes[-1] is self:  # Whose state takes the place of the others'.
            return of_each([each._own_state() for each in self._namesakes])
        return self._own_state()

    def _own_state(self, of_all_ranks: bool = True) -> dict[str, Any]:
        own = {"log_name": self.log_name, "batches_trained_whole": self.batches_trained_whole}
        selectors = self.selector.state_dict(of_all_ranks)
        return {**super().state_dict(), **own, **self._steps.state_dict(), **selectors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        state = own_state(self, self._namesakes, state, self._warn_once)
        self.batches_trained_whole = state.get("batches_trained_whole", 0)
        self._steps.load_state_dict(state)
        self.selector.load_state_dict(state)

    def match(self, event: Event, state: State) -> bool:
        """Tells whether to run: see :class:`.Algorithm`."""
        # By identity: the == of Composer's enumerations takes longer, all events together, than what is asked here.
        if event is Event.INIT or event is Event.FIT_START:
            return True
        if event is Event.AFTER_DATALOADER:
            takes_numbers = self._is_numbered or self.selector.store is not None
            selects = self.selects and (not self.selector.rehearsed or self._is_scheduled(state))
            return takes_numbers or selects or self._steps.shows_picks
        if event is Event.EVAL_BATCH_START or event is Event.PREDICT_BATCH_START:
            return beginning.numbers_are_there(state)
        if event is Event.BEFORE_FORWARD:
            return self._rows.has_picks or self._ranks.watches_step or self.selector.watches
        if event is Event.BEFORE_LOSS and self.selector.watches:
            return True
        if event is Event.BATCH_START or event is Event.BEFORE_LOSS or event is Event.AFTER_LOSS:
            return self._rows.has_weights
        if event is Event.AFTER_TRAIN_BATCH:
            return self.selector.source.serves
        if event is Event.BATCH_END:
            return self.minibatch is not None or self._rows.has_picks or self._steps.is_late or self._decides
        return False

    @property
    def selects(self) -> bool:
        """Whether there is anything to select at all."""
        return self.selector.selects(self.keep)

    def _is_scheduled(self, state: State) -> bool:
        return is_scheduled(state, self.clock, self.start, self.end, self.interrupt)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Runs the part of the algorithm that belongs to an event: see :class:`.Algorithm`."""
        if event is Event.INIT:
            self._reset(state)
            self._namesakes = namesakes_of(self, state.algorithms)
            self._check_setup(state)
            self.ordered_first = False
        elif event is Event.FIT_START:
            self._reset_fit(state)
            beginning.check_numbers(state, [self, *beginning.others_beside(self, state)])
            self._is_numbered, self._begun = beginning.numbers_are_there(state), -1
            if self.selector.store is not None:
                self.selector.store.begin_fit(state)
            self._check_schedule_and_order(state)
            self.ordered_first = False
        elif event is Event.EVAL_BATCH_START or event is Event.PREDICT_BATCH_START:
            state.batch = without_numbers(state.batch)
        elif event is Event.AFTER_DATALOADER:
            self._begin_batch(state, logger)
            if not self._scheduled and self._steps.shows_picks:
                self._steps.show_whole(logger)
            if not self.selects or (self.selector.rehearsed and not self._scheduled):
                return
            self._decides = self.selector.decides and self._scheduled
            self.selector.source.begin_step()
            try:
                self._after_dataloader(state, logger)
            finally:
                self.selector.source.end_selection()
        elif event is Event.BATCH_START:
            self._rows.find_rows(state.batch)
        elif event is Event.BEFORE_FORWARD:
            state.batch = self._rows.enter_microbatch(state.batch)
            self._ranks.see_forward(state, lambda: self._reader.count(state.batch))
            if self.selector.watches:
                self.selector.see_forward(state, self._reader.count(state.batch))
        elif event is Event.BEFORE_LOSS:
            if self.selector.watches:
                self.selector.see_loss(state, lambda: self._rows_in_minibatch(state.batch))
            if self.selector.weighting is not None and self._rows.has_weights:
                self.selector.weighting.before_loss(state)
        elif event is Event.AFTER_LOSS:
            self._after_loss(state)
        elif event is Event.AFTER_TRAIN_BATCH:
            self.selector.source.end_step()
        elif event is Event.BATCH_END:
            self._batch_end(state, logger)

    def _rows_in_minibatch(self, microbatch: Any) -> torch.Tensor | None:
        """Tells which samples of the minibatch a microbatch has, if they are picks and as they were."""
        rows = self._rows.rows_of(microbatch)
        if rows is None or self.last_selection is None:
            return None
        return self.last_selection.indices.cpu()[rows]

    def _check_setup(self, state: State) -> None:
        """Raises at INIT if the model or another algorithm cannot go with this one."""
        if not isinstance(unwrap(state.model), ComposerModel):
            raise TypeError(
                f"{self._owner} needs a ComposerModel, got {type(state.model).__name__}. Subclass it "
                "or wrap the module in composer.models.ComposerClassifier."
            )
        check_apart(self, state)
        self.selector.check_setup(state, self.keep)
        if self.selects and self.selector.weighting is not None:
            if not self.ordered_first:
                check_order_of_losses(self, state, LabelSmoothing)
            check_unweighted_losses(self, state)

    def _check_schedule_and_order(self, state: State) -> None:
        """Warns at FIT_START of what will come out otherwise than it says; raises if weights would be undone."""
        if not self.selects:
            return
        check_apart(self, state)
        if not self.ordered_first:
            check_order(self, state)
            if self.selector.weighting is not None:
                check_order_of_losses(self, state, Algorithm)
        if (remark := remark_on_epochs(state, self.clock, self.start, self.end)) is not None:
            self._warn_once(remark)

    def _begin_batch(self, state: State, logger: Logger) -> None:
        """Does what comes before any selection, for all selecting algorithms: whichever of them runs first does it."""
        batch = int(state.timestamp.batch)
        if self._begun == batch:
            return
        others = beginning.others_beside(self, state)
        beginning.take_numbers_for_all(state, [self, *others])
        for each in (self, *others):
            each._begun = batch
            each._scheduled = each.selects and each._is_scheduled(state)
        for each in others:
            if each.selects and not each.selector.rehearsed:
                each._rehearse(state, logger)  # On the whole minibatch, before any is picked from it.

    def _rehearse(self, state: State, logger: Logger) -> None:
        """Shows, on a first batch that others may select from, that selection works."""
        state.batch = state.device.batch_to_device(state.batch)
        self.selector.source.begin_step()
        try:
            self._rehearse_selection(state, logger)
        finally:
            self.selector.source.end_selection()

    def _rehearse_selection(self, state: State, logger: Logger) -> None:
        on_all_ranks(lambda: self._check_first_batch(state), self._owner)
        num_samples = self._reader.count(state.batch)
        self._ranks.see_first_batch(state, num_samples)
        self._reader.learn(state.batch, num_samples)
        num_picks = self._ranks.num_picks(state, num_samples, self.selector.share(self.keep))
        if self.selector.looks:
            activate_training_weights(state, logger)
        with no_trace(unwrap(state.model)):
            on_all_ranks(lambda: self.selector.rehearse(state, num_samples, num_picks), self._owner)
        picked_from = any(selects_now(each, state) for each in (self, *state.algorithms))
        if self.selector.weighting is not None and not picked_from:
            self._rows.rehearse(state, num_samples)

    def _after_dataloader(self, state: State, logger: Logger) -> None:
        started = time.perf_counter()
        state.batch = state.device.batch_to_device(state.batch)
        if not self.selector.rehearsed:
            self._rehearse_selection(state, logger)
        if not self._scheduled:
            return
        num_samples = self._reader.count(state.batch)
        if num_samples == 0:
            self._train_whole(self._of_nothing(state), logger)
            return
        self._reader.learn(state.batch, num_samples)
        num_picks = self._ranks.num_picks(state, num_samples, self.selector.share(self.keep))
        if self.selector.looks:
            activate_training_weights(state, logger)
        self.last_selection = None
        self.selector.begin_step(num_samples)
        # A single sample needs no selection, but a model may need all ranks in each forward pass.
        may_be_fewer = self.selector.leaves_out or self.selector.rule.varies
        if num_picks == num_samples and not may_be_fewer and not self._ranks.stay_in_step(state):
            self._steps.show_whole(logger)
            return
        selected = self._select(state, num_samples, num_picks)
        picks = self._ranks.with_enough_samples(state, selected, num_samples, self.selector.left_out)
        self._ranks.begin_step(num_samples if isinstance(picks, WholeBatch) else len(picks.indices))
        if isinstance(picks, WholeBatch):
            self._train_whole(picks, logger)
        else:
            self._train_on(state, picks, num_samples)
            self.selector.begin_step(len(picks.indices))
            filled_up = isinstance(selected, Picks) and len(picks.indices) > len(selected.indices)
            cost = self.selector.cost(len(picks.indices) / num_samples)
            metrics = metrics_of(picks, num_samples, filled_up, cost)
            metrics["selection_time"] = time.perf_counter() - started
            self._steps.log(logger, metrics, picks.found, int(state.timestamp.batch))

    # What measurements from outside wrap or read, by the names that it has had since version 0.1.0:

    def _select(self, state: State, num_samples: int, num_picks: int) -> Picks | WholeBatch:
        """Picks ``num_picks`` of the ``num_samples`` samples of ``state.batch``."""
        return self.selector.select(state, num_samples, num_picks)

    def _after_loss(self, state: State) -> None:
        """Replaces the loss of a microbatch by its weighted loss."""
        assert self.selector.weighting is not None
        assert self._rows.of_microbatch is not None
        self.selector.weighting.after_loss(state, self._rows.of_microbatch, self._rows.rehearsing)
        self._rows.weighed = True

    @property
    def _microbatch_weights(self) -> torch.Tensor | None:
        """The weights of the microbatch's samples, shape (n,)."""
        return self._rows.of_microbatch

    @property
    def _single_pass(self) -> SinglePass | None:
        """The forward pass that serves the training step, too, if there is one."""
        return self.selector.source.single

    def _check_first_batch(self, state: State) -> None:
        """Raises if the first batch cannot be selected from, as far as can be told without a forward pass."""
        num_samples = self._reader.count(state.batch)
        if num_samples == 0:
            self._of_nothing(state)
        take_samples(state.batch, slice(0, 1), num_samples)
        self._ranks.check_ghost_batches(state, num_samples, self.keep, self._owner)
        self.selector.check_first_batch(state)

    def _of_nothing(self, state: State) -> WholeBatch:
        """An empty batch is an error at the start, and later, at the end of a rank's data, the Trainer's to take."""
        if not self.selector.rehearsed or needs_all_ranks(unwrap(state.model)):
            raise ValueError(
                "The batch is empty: no sample to select from. Check the sampler, or pass drop_last=True to the loader."
            )
        return WholeBatch("a minibatch is empty: there is no sample to select from. Check the sampler.")

    def _train_whole(self, whole: WholeBatch, logger: Logger) -> None:
        self.batches_trained_whole += 1
        self._steps.show_whole(logger)
        logger.log_metrics({f"{self.log_name}/batches_trained_whole": self.batches_trained_whole})
        if whole.warning is not None:
            self._warn_once(whole.warning)

    def _train_on(self, state: State, picks: Picks, num_samples: int) -> None:
        """Puts the picks in the batch's place."""
        self.last_selection, self.minibatch = picks, state.batch
        size = state.device_train_microbatch_size
        # Of picks without weights that stay one microbatch, nobody will ask which they are.
        stay = size is not None and len(picks.indices) <= size and not state.auto_microbatching
        recorded = picks.weights is not None or self.selector.store is not None or not stay
        with span("indexing"):
            state.batch = self._rows.pick(state.batch, picks.indices, num_samples, recorded)
        self.selector.source.serve(state, picks)
        if picks.weights is not None:
            self._rows.give(state.device.tensor_to_device(picks.weights.float()))

    def _batch_end(self, state: State, logger: Logger) -> None:
        self._steps.log_late(logger)
        self._steps.drop()
        self.minibatch = None
        if self.selector.weighting is not None:
            self.selector.weighting.end_step(state)
        if self._decides:
            self._decides = False
            self.selector.end_step(state, self.keep)
        self._rows.clear()
