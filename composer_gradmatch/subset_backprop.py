"""What the selecting algorithms share: the schedule, the batch's samples, weights into the loss, logging."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from composer.algorithms import SelectiveBackprop
from composer.algorithms.selective_backprop import should_selective_backprop
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.models import ComposerModel

from composer_gradmatch.batches import count_samples, match_rows, take_samples
from composer_gradmatch.other_algorithms import activate_training_weights, ghost_batch_size, smallest_microbatch
from composer_gradmatch.selection_pass import largest_on_all_ranks, needs_all_ranks, no_trace, unwrap
from composer_gradmatch.spans import span

__all__ = ["Selection", "SubsetBackprop", "WholeBatch"]


@dataclass(frozen=True)
class Selection:
    """The picked samples of one minibatch.

    Attributes:
        indices (torch.Tensor): The picks, int64, shape (n,).
        weights (torch.Tensor, optional): Their weights, shape (n,), float64, with sum n; None means that all are one.
            Default: ``None``.
        metrics (dict, optional): What else to log of the step, numbers or scalar tensors; with weights, also their
            ``effective_sample_size`` and ``largest_weight``. Default: ``{}``.
        matched (torch.Tensor, optional): Whether the picks are chosen at all, a boolean scalar; None where they are.
            Default: ``None``.
    """

    indices: torch.Tensor
    weights: torch.Tensor | None = None
    metrics: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    matched: torch.Tensor | None = None


@dataclass(frozen=True)
class WholeBatch:
    """A minibatch that cannot be selected from and is trained whole.

    Attributes:
        warning (str, optional): What to warn of, once a run. Default: ``None``, for nothing.
    """

    warning: str | None = None


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

    Raises:
        ValueError: If a value is out of range.
    """

    #: The prefix of the logged metrics, and the algorithm's name in YAML.
    log_name: ClassVar[str]
    #: Whether selection needs a forward pass of its own.
    two_passes: ClassVar[bool] = False
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
        self.start, self.end, self.keep, self.interrupt = start, end, keep, interrupt
        self.input_key, self.target_key = input_key, target_key
        #: Set by the algorithm pass :func:`.select_first`, which takes care of the order of algorithms.
        self.ordered_first = False
        self.batches_trained_whole = 0
        self.batches_not_matched = 0
        self._warned: set[str] = set()
        self._rehearsed = False
        self._ghost_batch_size = 1
        self._clear_weights()

    def _clear_weights(self) -> None:
        self._weights: torch.Tensor | None = None
        self._picked_batch: Any = None
        self._microbatch_weights: torch.Tensor | None = None
        # Logged when the step is over: a value on a GPU makes the host wait for the work before it.
        self._to_log: tuple[dict[str, float | torch.Tensor], torch.Tensor, int] | None = None

    @abstractmethod
    def _select(self, state: State, num_samples: int, num_picks: int) -> Selection | WholeBatch:
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
        if event in (Event.BATCH_START, Event.BEFORE_FORWARD, Event.AFTER_LOSS):
            return self._weights is not None
        if event == Event.BATCH_END:
            return self._weights is not None or self._to_log is not None
        return False

    def _is_scheduled(self, state: State) -> bool:
        elapsed = state.get_elapsed_duration()
        assert elapsed is not None, "elapsed duration should be set on Event.AFTER_DATALOADER"
        return should_selective_backprop(
            current_duration=float(elapsed),
            batch_idx=int(state.timestamp.batch_in_epoch),
            start=self.start,
            end=self.end,
            interrupt=self.interrupt,
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Runs the part of the algorithm that belongs to an event: see :class:`.Algorithm`."""
        if event == Event.INIT:
            self._check_setup(state)
        elif event == Event.FIT_START:
            self._clear_weights()
            self._rehearsed = False
            if not self.ordered_first:
                self._check_order(state)
        elif event == Event.AFTER_DATALOADER:
            self._after_dataloader(state, logger)
        elif event == Event.BATCH_START:
            self._batch_start(state)
        elif event == Event.BEFORE_FORWARD:
            assert self._weights is not None
            self._microbatch_weights = match_rows(state.batch, self._picked_batch, self._weights)
        elif event == Event.AFTER_LOSS:
            self._after_loss(state)
        elif event == Event.BATCH_END:
            if self._to_log is not None:
                self._log_step_before(logger)
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
        position = next(i for i, algorithm in enumerate(state.algorithms) if algorithm is self)
        return state.algorithms[position + 1 :]

    def _check_order(self, state: State) -> None:
        """Warns at FIT_START of algorithms that change the batch before this one sees it."""
        earlier = [
            type(other).__name__
            for other in self._earlier_after_events(state)
            if other.match(Event.AFTER_DATALOADER, state)
        ]
        if earlier and self.keep < 1:
            warnings.warn(
                f"{', '.join(earlier)} will change each minibatch on AFTER_DATALOADER before {type(self).__name__} "
                "selects from it. To select first, add to the Trainer:\n"
                "    algorithm_passes=[composer_gradmatch.select_first]",
                stacklevel=2,
            )

    def _after_dataloader(self, state: State, logger: Logger) -> None:
        started = time.perf_counter()
        state.batch = state.device.batch_to_device(state.batch)
        num_samples = count_samples(state.batch, self.input_key, self.target_key)
        if num_samples == 0:
            self._train_whole(self._of_nothing(state), logger)
            return
        num_picks = max(1, int(self.keep * num_samples))
        if self.two_passes:
            activate_training_weights(state, logger)
        if not self._rehearsed:
            self._check_ghost_batches(state, num_samples, num_picks)
            with no_trace(unwrap(state.model)):
                self._rehearse(state, num_samples, num_picks)
            self._rehearsed = True
        if not self._is_scheduled(state):
            return
        # A single sample needs no selection, but a model may need all ranks in each forward pass.
        if num_picks == num_samples and not needs_all_ranks(unwrap(state.model)):
            return

        selection = self._select(state, num_samples, num_picks)
        if isinstance(selection, Selection) and self._too_few_for_ghost_batches(state, len(selection.indices)):
            selection = WholeBatch(
                "some picks make a microbatch of fewer samples than GhostBatchNorm's ghost_batch_size; their "
                "minibatches are trained whole."
            )
        if needs_all_ranks(unwrap(state.model)):
            n = len(selection.indices) if isinstance(selection, Selection) else num_samples
            if not self._same_on_all_ranks(state, n):
                selection = WholeBatch(
                    "ranks picked numbers of samples that make different numbers of microbatches, and the model's "
                    "forward passes are ones of all ranks; their minibatches are trained whole. Choose a "
                    "device_train_microbatch_size of at least keep times the minibatch."
                )
        if isinstance(selection, WholeBatch):
            self._train_whole(selection, logger)
            return
        with span("indexing"):
            state.batch = take_samples(state.batch, selection.indices, num_samples)
        self._after_selection(state, selection)
        n = len(selection.indices)
        if selection.weights is not None:
            self._weights = state.device.tensor_to_device(selection.weights.float())
        metrics: dict[str, float | torch.Tensor] = {
            "fraction_kept": n / num_samples,
            # Of unit weights; a selection with weights of its own brings its own.
            "effective_sample_size": float(n),
            "largest_weight": 1.0,
            **selection.metrics,
            "estimated_cost": self._estimated_cost(num_samples, n),
            "selection_time": time.perf_counter() - started,
        }
        if selection.matched is None:
            self._log(logger, metrics)
        else:
            self._to_log = metrics, selection.matched, int(state.timestamp.batch)

    def _after_selection(self, state: State, selection: Selection) -> None:
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

    def _same_on_all_ranks(self, state: State, num_samples: int) -> bool:
        """Whether a batch of ``num_samples`` here makes as many microbatches as the other ranks' batches there."""
        size = max(1, int(state.device_train_microbatch_size or num_samples))
        passes = -(-num_samples // size)
        return largest_on_all_ranks(passes, state.device) == -largest_on_all_ranks(-passes, state.device)

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

    def _too_few_for_ghost_batches(self, state: State, num_picks: int) -> bool:
        return smallest_microbatch(num_picks, state.device_train_microbatch_size) < self._ghost_batch_size

    def _check_ghost_batches(self, state: State, num_samples: int, num_picks: int) -> None:
        """Raises on the run's first batch, which is a full one, if ``GhostBatchNorm`` cannot take its picks."""
        self._ghost_batch_size = ghost_batch_size(unwrap(state.model))
        if int(state.timestamp.batch) == 0 and self._too_few_for_ghost_batches(state, num_picks):
            smallest = smallest_microbatch(num_picks, state.device_train_microbatch_size)
            raise ValueError(
                f"{type(self).__name__} with keep={self.keep} picks {num_picks} of {num_samples} samples, which makes "
                f"a microbatch of {smallest}, but GhostBatchNorm takes at least "
                f"ghost_batch_size={self._ghost_batch_size} samples at once. Lower ghost_batch_size, raise keep or "
                "the batch size, or choose a device_train_microbatch_size that leaves no smaller rest."
            )

    def _batch_start(self, state: State) -> None:
        """Remembers the batch that the Trainer will split, which others may have changed since the selection."""
        assert self._weights is not None
        num_samples = count_samples(state.batch, self.input_key, self.target_key)
        if num_samples != len(self._weights):
            raise ValueError(
                f"{type(self).__name__} picked {len(self._weights)} weighted samples, but another algorithm then made "
                f"them {num_samples}. Remove the algorithm that changes the number of samples on AFTER_DATALOADER."
            )
        self._picked_batch = state.batch

    def _after_loss(self, state: State) -> None:
        """Replaces the loss of a microbatch by its weighted loss."""
        raise NotImplementedError(f"{type(self).__name__} gives weights, so it must weigh the loss.")
