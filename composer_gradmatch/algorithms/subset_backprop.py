"""What the selecting algorithms share: the schedule, the batch's samples, weights into the loss, logging."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from composer.algorithms import SelectiveBackprop
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from torch.nn.parallel import DistributedDataParallel

from composer_gradmatch.algorithms.enough_samples import (
    enough_samples,
    fewest_in_a_microbatch,
    fill_up,
    num_microbatches,
    smallest_microbatch,
)
from composer_gradmatch.algorithms.other_algorithms import activate_training_weights, ghost_batch_size
from composer_gradmatch.algorithms.schedule import Clock, check_clock, is_scheduled, remark_on_epochs
from composer_gradmatch.batches import count_samples, take_samples
from composer_gradmatch.batches.nests import map_nest
from composer_gradmatch.batches.picked_rows import RowRecord
from composer_gradmatch.batches.sample_leaves import names_by_length, sample_names
from composer_gradmatch.forward.traceless import (
    largest_on_all_ranks,
    needs_all_ranks,
    no_trace,
    sum_on_all_ranks,
    unwrap,
)
from composer_gradmatch.rules.picks import Picks, WholeBatch
from composer_gradmatch.spans import span

__all__ = ["Picks", "SubsetBackprop", "WholeBatch"]


class SubsetBackprop(Algorithm):
    """Backpropagates a part of each minibatch, picked on ``Event.AFTER_DATALOADER``; the base of our algorithms.

    On the very first batch the selection is rehearsed, and its result thrown away, if the schedule starts
    later: what cannot work fails in the first minute, not when selection begins.

    Args:
        start (float, optional): Start of selection as a fraction of training. Default: ``0.5``.
        end (float, optional): End of selection as a fraction of training. Default: ``0.9``.
        keep (float, optional): Fraction of the minibatch to keep, m = max(1, int(keep·M)). Default: ``0.5``.
        interrupt (int, optional): Every ``interrupt``-th batch is trained whole; 0 selects from all.
            Default: ``2``.
        input_key (str | int | tuple[Callable, Callable] | Any, optional): Where a batch has its inputs: a key or a
            pair of getter and setter. Default: ``0``.
        target_key (str | int | tuple[Callable, Callable] | Any, optional): The same for its targets.
            Default: ``1``.
        clock (str, optional): What ``start`` and ``end`` are fractions of: ``"duration"`` counts in the unit of
            ``max_duration``, which in epochs are whole ones, as Composer's own algorithm does; ``"batch"`` counts
            batches within an epoch, too. Default: ``"duration"``.

    Attributes:
        last_selection (Picks, optional): The picks of the last minibatch that was selected from: indices, weights
            and metrics; None if that was trained whole.

    Raises:
        ValueError: If a value is out of range.
    """

    #: The prefix of the logged metrics, and the algorithm's name in YAML.
    log_name: ClassVar[str]
    #: Whether selection needs a forward pass of its own.
    two_passes: ClassVar[bool] = False
    #: Whether selection gives weights.
    weighs_samples: ClassVar[bool] = False
    #: Tells :func:`.select_first` that this algorithm comes first.
    selects_samples: ClassVar[bool] = True

    def __init__(
        self,
        start: float = 0.5,
        end: float = 0.9,
        keep: float = 0.5,
        interrupt: int = 2,
        input_key: Any = 0,
        target_key: Any = 1,
        clock: Clock = "duration",
    ) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], the share of each minibatch to train on; got {keep}.")
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"start and end must be fractions of training with 0 <= start < end <= 1; got start={start}, end={end}."
            )
        if isinstance(interrupt, bool) or not isinstance(interrupt, int) or interrupt < 0:
            raise ValueError(
                f"interrupt must be an integer >= 0 (0: select from every batch; n: train every n-th batch whole); "
                f"got {interrupt!r}."
            )
        check_clock(clock)
        self.start, self.end, self.keep, self.interrupt = start, end, keep, interrupt
        self.input_key, self.target_key = input_key, target_key
        self.clock: Clock = clock
        #: Set by the algorithm pass :func:`.select_first`, which takes care of the order of algorithms; of one event.
        self.ordered_first = False
        self._reset()

    def _reset(self) -> None:
        """Forgets what belongs to one Trainer."""
        self.batches_trained_whole = 0
        self.batches_not_matched = 0
        #: The picks of the last minibatch that was selected from; None if that was trained whole.
        self.last_selection: Picks | None = None
        self._warned: set[str] = set()
        self._not_per_sample: set[str] = set()
        self._reset_fit()

    def _reset_fit(self) -> None:
        """Forgets what belongs to one ``fit``, in which modules may be replaced."""
        self._rehearsed = False
        self._weighed = False
        self._ghost_batch_size = 1
        #: Whether gradients were seen here not to be synchronised in each microbatch, and whether on any rank.
        self._saw_one_sync = self._syncs_once = False
        #: The most samples of the ranks' first batches.
        self._largest_batch = 0
        #: The samples of the step, until its first forward pass.
        self._step_size: int | None = None
        self._clear_weights()

    def _clear_weights(self) -> None:
        self._weights: torch.Tensor | None = None
        self._picked: RowRecord | None = None
        self._trained: RowRecord | None = None
        self._microbatch_weights: torch.Tensor | None = None
        #: Whether the weights are those of a rehearsal, on the whole minibatch, and reach no loss.
        self._rehearsing = False
        # Logged when the step is over: a value on a GPU makes the host wait for the work before it.
        self._to_log: tuple[dict[str, float | torch.Tensor], torch.Tensor, int] | None = None

    @abstractmethod
    def _select(self, state: State, num_samples: int, num_picks: int) -> Picks | WholeBatch:
        """Picks ``num_picks`` of the ``num_samples`` samples of ``state.batch``."""

    def _rehearse(self, state: State, num_samples: int, num_picks: int) -> None:
        """Does what of ``_select`` can fail, without a trace."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the algorithm."""
        return {
            **super().state_dict(),
            "batches_trained_whole": self.batches_trained_whole,
            "batches_not_matched": self.batches_not_matched,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.batches_trained_whole = state.get("batches_trained_whole", 0)
        self.batches_not_matched = state.get("batches_not_matched", 0)

    def match(self, event: Event, state: State) -> bool:
        """Whether to run: see :class:`.Algorithm`."""
        if event in (Event.INIT, Event.FIT_START):
            return True
        if event == Event.AFTER_DATALOADER:
            return self.keep < 1 and (not self._rehearsed or self._is_scheduled(state))
        if event == Event.BEFORE_FORWARD:
            return self._picked is not None or self._step_size is not None
        if event in (Event.BATCH_START, Event.BEFORE_LOSS, Event.AFTER_LOSS):
            return self._weights is not None
        if event == Event.BATCH_END:
            return self._picked is not None or self._to_log is not None
        return False

    def _is_scheduled(self, state: State) -> bool:
        return is_scheduled(state, self.clock, self.start, self.end, self.interrupt)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Runs the part of the algorithm that belongs to an event: see :class:`.Algorithm`."""
        if event == Event.INIT:
            self._reset()
            self._check_setup(state)
            self.ordered_first = False
        elif event == Event.FIT_START:
            self._reset_fit()
            if self.keep < 1:
                self._check_order(state)
                if (remark := remark_on_epochs(state, self.clock, self.start, self.end)) is not None:
                    self._warn_once(remark)
            self.ordered_first = False
        elif event == Event.AFTER_DATALOADER:
            self._after_dataloader(state, logger)
        elif event == Event.BATCH_START:
            self._batch_start(state)
        elif event == Event.BEFORE_FORWARD:
            self._before_forward(state)
        elif event == Event.BEFORE_LOSS:
            self._before_loss(state)
        elif event == Event.AFTER_LOSS:
            self._after_loss(state)
        elif event == Event.BATCH_END:
            if self._to_log is not None:
                self._log_step_before(logger)
            self._batch_end(state)
            self._clear_weights()

    def _check_setup(self, state: State) -> None:
        """Raises at INIT if the model or another algorithm cannot go with this one."""
        if not isinstance(unwrap(state.model), ComposerModel):
            raise TypeError(
                f"{type(self).__name__} needs a ComposerModel, got {type(state.model).__name__}. Subclass it "
                "or wrap the module in composer.models.ComposerClassifier."
            )
        for other in state.algorithms:
            if other is self or not isinstance(other, SubsetBackprop | SelectiveBackprop) or other.keep >= 1:
                continue
            if self.keep < 1 and self.start < other.end and other.start < self.end:
                raise ValueError(
                    f"{type(self).__name__} (from {self.start} to {self.end} of training) and {type(other).__name__} "
                    f"(from {other.start} to {other.end}) would both select from the same minibatches. Keep one of "
                    "them, or give them intervals that do not overlap."
                )

    def _earlier_after_events(self, state: State) -> Sequence[Algorithm]:
        """What runs before this algorithm on AFTER_ events: what stands behind it, since Composer reverses the list."""
        positions = [i for i, algorithm in enumerate(state.algorithms) if algorithm is self]
        if not positions:
            raise ValueError(
                f"This {type(self).__name__} is not among the Trainer's algorithms. Pass it as "
                "Trainer(algorithms=[...]), which calls its events in order."
            )
        return state.algorithms[positions[0] + 1 :]

    def _check_order(self, state: State) -> None:
        """Warns at FIT_START of algorithms that change the batch before this one sees it."""
        if self.ordered_first:
            return
        earlier = [
            type(other).__name__
            for other in self._earlier_after_events(state)
            if other.match(Event.AFTER_DATALOADER, state)
        ]
        if earlier:
            warnings.warn(
                f"{', '.join(earlier)} will change each minibatch on AFTER_DATALOADER before {type(self).__name__} "
                "selects from it. To select first, add to the Trainer:\n"
                "    algorithm_passes=[composer_gradmatch.select_first]",
                stacklevel=2,
            )

    def _after_dataloader(self, state: State, logger: Logger) -> None:
        started = time.perf_counter()
        state.batch = state.device.batch_to_device(state.batch)
        first = not self._rehearsed
        if first:
            self._on_all_ranks(lambda: self._check_first_batch(state))
            largest = count_samples(state.batch, self.input_key, self.target_key)
            self._largest_batch = largest if dist.get_world_size() == 1 else largest_on_all_ranks(largest, state.device)
        num_samples = count_samples(state.batch, self.input_key, self.target_key)
        if num_samples == 0:
            self._train_whole(self._of_nothing(state), logger)
            return
        self._not_per_sample |= names_by_length(state.batch, num_samples).keys()
        num_picks = self._num_picks(state, num_samples)
        if self.two_passes:
            activate_training_weights(state, logger)
        if first:
            with no_trace(unwrap(state.model)):
                self._on_all_ranks(lambda: self._rehearse(state, num_samples, num_picks))
            self._rehearsed = True
        if not self._is_scheduled(state):
            if first and self.weighs_samples:
                self._rehearse_weights(state, num_samples)
            return
        self.last_selection = None
        # A single sample needs no selection, but a model may need all ranks in each forward pass.
        if num_picks == num_samples and not self._ranks_stay_in_step(state):
            return

        selection = self._select(state, num_samples, num_picks)
        picked = len(selection.indices) if isinstance(selection, Picks) else 0
        selection = self._with_enough_samples(state, selection, num_samples)
        if isinstance(selection, WholeBatch):
            self._step_size = num_samples
            self._train_whole(selection, logger)
            return
        self.last_selection = selection
        n = self._step_size = len(selection.indices)
        with span("indexing"):
            state.batch = self._pick(state.batch, selection.indices, num_samples)
        self._after_selection(state, selection)
        if selection.weights is not None:
            self._weights = state.device.tensor_to_device(selection.weights.float())
        metrics: dict[str, float | torch.Tensor] = {
            "fraction_kept": n / num_samples,
            # Of unit weights; a selection with weights of its own brings its own.
            "effective_sample_size": float(n),
            "largest_weight": 1.0,
            **selection.metrics,
            **({} if n == picked else {"fraction_kept": n / num_samples}),
            "estimated_cost": self._estimated_cost(num_samples, n),
            "selection_time": time.perf_counter() - started,
        }
        if selection.matched is None:
            self._log(logger, metrics)
        else:
            self._to_log = metrics, selection.matched, int(state.timestamp.batch)

    def _names(self, batch: Any, num_samples: int) -> frozenset[str]:
        """The names of what in a batch has a row for each sample."""
        return sample_names(batch, num_samples, self._not_per_sample)

    def _pick(self, batch: Any, indices: torch.Tensor, num_samples: int) -> Any:
        """The picked samples' batch, remembered as it is: other algorithms may change it."""
        names = self._names(batch, num_samples)
        picked = take_samples(batch, indices, num_samples, self._not_per_sample)
        self._picked = RowRecord.of(picked, len(indices), names, original=batch, indices=indices)
        return picked

    def _on_all_ranks(self, check: Callable[[], None]) -> None:
        """Runs a check of the first batch; what it raises on one rank is raised on all, which would else wait for it.

        Where a forward pass is one of all ranks and fails on one of them, the others wait all the same.
        """
        error: Exception | None = None
        try:
            check()
        except Exception as caught:
            if dist.get_world_size() == 1:
                raise
            error = caught
        if dist.get_world_size() == 1:
            return
        messages = dist.all_gather_object(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"{type(self).__name__} failed on rank {rank}: {message}")

    def _check_first_batch(self, state: State) -> None:
        """Raises if the first batch cannot be selected from, as far as can be told without a forward pass."""
        num_samples = count_samples(state.batch, self.input_key, self.target_key)
        if num_samples == 0:
            self._of_nothing(state)
        take_samples(state.batch, slice(0, 1), num_samples)
        self._check_ghost_batches(state, num_samples)

    def _rehearse_weights(self, state: State, num_samples: int) -> None:
        """Lets the first batch, which is trained whole, go the way of weighted picks, up to its losses."""
        self._rehearsing = True
        self._picked = RowRecord.of(state.batch, num_samples, self._names(state.batch, num_samples))
        # Of samples that cannot be told apart, equal weights would hide it.
        self._weights = state.device.tensor_to_device(torch.linspace(0.5, 1.5, num_samples))

    def _num_picks(self, state: State, num_samples: int) -> int:
        """Counts the picks: m = max(1, int(keep·M)), and more where batch normalisation cannot take as few."""
        num_picks = max(1, int(self.keep * num_samples))
        return enough_samples(num_picks, num_samples, state, self._fewest(state, num_picks))

    def _fewest(self, state: State, num_picks: int) -> int:
        """The fewest samples of a microbatch, looked for only where they could be too few."""
        smallest = smallest_microbatch(num_picks, state.device_train_microbatch_size)
        if smallest >= max(2, self._ghost_batch_size):
            return 1
        return max(self._ghost_batch_size, fewest_in_a_microbatch(unwrap(state.model)))

    def _with_enough_samples(
        self, state: State, selection: Picks | WholeBatch, num_samples: int
    ) -> Picks | WholeBatch:
        """The selection, filled up where its step needs more samples; the whole minibatch where it has not as many."""
        size = state.device_train_microbatch_size
        picked = len(selection.indices) if isinstance(selection, Picks) else num_samples
        fewest = self._fewest(state, picked)
        microbatches = num_microbatches(picked, size)
        in_step, growth = self._ranks_stay_in_step(state), 1.0
        if in_step:
            microbatches = largest_on_all_ranks(microbatches, state.device)
        wanted = enough_samples(picked, num_samples, state, fewest, microbatches)
        fits = (
            smallest_microbatch(wanted, size) >= fewest and num_microbatches(wanted, size) == microbatches
        ) or picked == num_samples
        if in_step:
            fits = largest_on_all_ranks(int(not fits), state.device) == 0
            self._syncs_once = largest_on_all_ranks(int(self._saw_one_sync), state.device) > 0
            growth = sum_on_all_ranks(wanted, state.device) / sum_on_all_ranks(picked, state.device)
        if isinstance(selection, WholeBatch):
            return selection
        if not fits:
            return WholeBatch(
                "a minibatch has too few samples to make the microbatches that its model, or the other ranks, need; "
                "it and others like it are trained whole."
            )
        if not in_step:
            return fill_up(selection, num_samples, wanted)
        # The Trainer's mean is over the samples of all ranks.
        return fill_up(selection, num_samples, wanted, growth)

    def _ranks_stay_in_step(self, state: State) -> bool:
        """Whether all ranks must make the same number of microbatches.

        For forward passes that are ones of all ranks (FSDP, SyncBatchNorm), and where gradients are synchronised in
        each microbatch (Composer's default with algorithms that leave parameters without a gradient). Which it is, is
        seen in the first step of several microbatches; until then they do.
        """
        if dist.get_world_size() == 1:
            return False
        if needs_all_ranks(unwrap(state.model)):
            return True
        if not isinstance(state.model, DistributedDataParallel) or self._syncs_once:
            return False
        size = state.device_train_microbatch_size
        return size is not None and size < self._largest_batch

    def _after_selection(self, state: State, selection: Picks) -> None:
        """Does what follows once ``state.batch`` is that of the picks."""

    def _estimated_cost(self, num_samples: int, num_picks: int) -> float:
        """A step's cost as a share of the whole minibatch's; a forward pass is a third of it (§2 of the paper)."""
        return (num_samples / 3 * self.two_passes + num_picks) / num_samples

    def _log(self, logger: Logger, metrics: Mapping[str, float | torch.Tensor], step: int | None = None) -> None:
        logger.log_metrics({f"{self.log_name}/{key}": float(value) for key, value in metrics.items()}, step)

    def _log_step_before(self, logger: Logger) -> None:
        """Logs what was selected on a device, as of its step, once that is over."""
        assert self._to_log is not None
        metrics, matched, step = self._to_log
        if not matched:
            self.batches_not_matched += 1
            metrics = {key: metrics[key] for key in ("estimated_cost", "selection_time")}
            metrics["batches_not_matched"] = self.batches_not_matched
            self._warn_once(
                "a minibatch has last-layer gradients that are not finite, or whose mean is zero; of it and others "
                "like it m samples are trained with weights one."
            )
        self._log(logger, metrics, step)

    def _train_whole(self, whole: WholeBatch, logger: Logger) -> None:
        self.batches_trained_whole += 1
        logger.log_metrics({f"{self.log_name}/batches_trained_whole": self.batches_trained_whole})
        if whole.warning is not None:
            self._warn_once(whole.warning)

    def _warn_once(self, warning: str) -> None:
        if warning not in self._warned:
            self._warned.add(warning)
            warnings.warn(f"{type(self).__name__}: {warning}", stacklevel=2)

    def _of_nothing(self, state: State) -> WholeBatch:
        """An empty batch is an error at the start, and later, at the end of a rank's data, the Trainer's to take."""
        if not self._rehearsed or needs_all_ranks(unwrap(state.model)):
            raise ValueError(
                "The batch is empty: no sample to select from. Check the sampler, or pass drop_last=True to the loader."
            )
        return WholeBatch("a minibatch is empty: there is no sample to select from. Check the sampler.")

    def _check_ghost_batches(self, state: State, num_samples: int) -> None:
        """Raises on the run's first batch, which is a full one, if ``GhostBatchNorm`` cannot take its picks."""
        self._ghost_batch_size = ghost_batch_size(unwrap(state.model))
        num_picks = max(1, int(self.keep * num_samples))
        smallest = smallest_microbatch(num_picks, state.device_train_microbatch_size)
        if int(state.timestamp.batch) == 0 and smallest < self._ghost_batch_size:
            raise ValueError(
                f"{type(self).__name__} with keep={self.keep} picks {num_picks} of {num_samples} samples, which makes "
                f"a microbatch of {smallest}, but GhostBatchNorm takes at least "
                f"ghost_batch_size={self._ghost_batch_size} samples at once. Lower ghost_batch_size, raise keep or "
                "the batch size, or choose a device_train_microbatch_size that leaves no smaller rest."
            )

    def _batch_start(self, state: State) -> None:
        """Finds which pick each row of the batch is that the Trainer will split: others may have changed it."""
        assert self._weights is not None
        assert self._picked is not None
        num_samples = count_samples(state.batch, self.input_key, self.target_key)
        try:
            if num_samples != len(self._weights):
                raise ValueError(
                    f"{type(self).__name__} picked {len(self._weights)} weighted samples, but another algorithm then "
                    f"made them {num_samples}. List {type(self).__name__} before that algorithm in the Trainer's "
                    "algorithms and leave out select_first: then it comes last, since Composer reverses the order."
                )
            self._weights = self._picked.weights_now(state.batch, self._weights)
        except ValueError as error:
            self._weigh_all_alike(error, num_samples)
        self._trained = self._picked.updated(state.batch)

    def _weigh_all_alike(self, error: ValueError, num_samples: int) -> None:
        """Ends the run if weights cannot reach their samples from its first step on; later, gives up this step's."""
        if not self._weighed:
            raise error
        assert self._weights is not None
        self._warn_once(f"the picks of some steps are trained with weights one: {error}")
        self._weights = torch.ones(num_samples, device=self._weights.device)

    def _watches_microbatches(self, state: State) -> bool:
        return self._step_size is not None and not self._syncs_once and isinstance(state.model, DistributedDataParallel)

    def _before_forward(self, state: State) -> None:
        """Finds the weights of a microbatch's samples, and whether gradients are synchronised in each microbatch."""
        if self._picked is not None:
            state.batch = self._with_shared_tensors_whole(state.batch, self._trained or self._picked)
        if self._watches_microbatches(state):
            several = count_samples(state.batch, self.input_key, self.target_key) < (self._step_size or 0)
            self._saw_one_sync = several and not state.model.require_backward_grad_sync
        self._step_size = None
        if self._weights is None:
            return
        assert self._trained is not None
        try:
            self._microbatch_weights = self._trained.weights_of(state.batch, self._weights)
        except ValueError as error:
            num_samples = count_samples(state.batch, self.input_key, self.target_key)
            self._weigh_all_alike(error, len(self._weights))
            self._microbatch_weights = torch.ones(num_samples, device=self._weights.device)

    def _with_shared_tensors_whole(self, microbatch: Any, trained: RowRecord) -> Any:
        """A microbatch with those tensors whole that were picked from since their length happened to be M.

        That they are not per sample is seen by their not being split.
        """
        assert self._picked is not None
        shared = trained.names_left_whole(microbatch)
        self._not_per_sample |= shared
        originals = {name: self._picked.original[name] for name in shared if name in self._picked.original}
        if not originals:
            return microbatch
        return map_nest(lambda name, leaf: originals.get(name, leaf), microbatch)

    def _before_loss(self, state: State) -> None:
        """Does what must be done before the model's own loss sees the microbatch."""

    def _after_loss(self, state: State) -> None:
        """Replaces the loss of a microbatch by its weighted loss."""
        raise NotImplementedError(f"{type(self).__name__} gives weights, so it must weigh the loss.")

    def _batch_end(self, state: State) -> None:
        """Does what is due when a step is over."""
