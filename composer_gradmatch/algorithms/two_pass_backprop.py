"""What the algorithms share that select by a forward pass of their own over the whole minibatch."""

from __future__ import annotations

import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from composer.core import Event, Precision, State, get_precision_context
from composer.loggers import Logger
from torch import nn

from composer_gradmatch.algorithms.enough_samples import fewest_in_a_microbatch
from composer_gradmatch.algorithms.schedule import Clock
from composer_gradmatch.algorithms.subset_backprop import Picks, SubsetBackprop
from composer_gradmatch.batches import copy_batch, count_samples, describe_targets, take_samples
from composer_gradmatch.batches.given_batch import GivenBatch
from composer_gradmatch.forward.huggingface_losses import huggingface_losses
from composer_gradmatch.forward.loss_scale import LossScale
from composer_gradmatch.forward.losses import (
    LossFn,
    check_batch,
    check_losses,
    differentiable_outputs,
    per_sample_losses,
    takes_loss_from_logits,
    weighted_loss,
)
from composer_gradmatch.forward.sample_checks import Rows, check_rows
from composer_gradmatch.forward.traceless import (
    Generators,
    Moment,
    back_at,
    check_scale_factor,
    is_sharded,
    largest_on_all_ranks,
    needs_all_ranks,
    no_trace,
    precision_context,
    scale_inputs,
    unwrap,
)
from composer_gradmatch.forward.traces import ParameterContents
from composer_gradmatch.reuse.unsupported import UndecidedError, UnsupportedError
from composer_gradmatch.spans import span

if TYPE_CHECKING:
    from composer_gradmatch.reuse.single_pass import SinglePass

__all__ = ["TwoPassBackprop"]

Result = TypeVar("Result")


def _import_single_pass() -> type[SinglePass]:
    """Imports TorchDynamo, which takes seconds, and interfaces of torch that other versions may not have."""
    try:
        from composer_gradmatch.reuse.single_pass import SinglePass
    except ImportError as error:
        raise UnsupportedError(f"torch {torch.__version__} is not a version that it works with ({error})") from error
    return SinglePass


class TwoPassBackprop(SubsetBackprop):
    """A :class:`.SubsetBackprop` that selects by a forward pass of its own over the whole minibatch.

    Args:
        start (float, optional): See :class:`.SubsetBackprop`. Default: ``0.5``.
        end (float, optional): See :class:`.SubsetBackprop`. Default: ``0.9``.
        keep (float, optional): See :class:`.SubsetBackprop`. Default: ``0.5``.
        scale_factor (float, optional): Scale for downsampling the inputs of the selection pass, in (0, 1].
            Default: ``1.0``.
        interrupt (int, optional): See :class:`.SubsetBackprop`. Default: ``2``.
        input_key (Any, optional): See :class:`.SubsetBackprop`. Default: ``0``.
        target_key (Any, optional): See :class:`.SubsetBackprop`. Default: ``1``.
        loss_fn (Callable, optional): A function of (outputs, batch) that returns the loss of each sample, shape
            (M,); see :func:`.per_sample_losses` for what is asked without one. Default: ``None``.
        selection_microbatch_size (int | str, optional): Samples at a time in the selection pass; ``None`` for as many
            as in the training step; ``"auto"`` for all, and half as many whenever memory runs out, which ``None`` also
            does where the Trainer's own microbatch size is ``"auto"``. Default: ``None``.
        selection_precision (str | Precision, optional): The precision of the selection pass, e.g. ``"amp_bf16"``;
            ``None`` for the training step's. Default: ``None``.
        reuse_activations (bool, optional): Whether to make one forward pass instead of two: the selection pass is
            that of training, over the whole minibatch, and the backward pass takes the picks' part of what it saved.
            Costs the memory of M samples' activations. Each step compares what the forward pass reads with what it
            was at the capture and at the selection, in microseconds; a step in which that differs runs the model's
            own forward pass. Outputs and layouts are spot-checked in the first ten steps, and gradients verified at
            the capture and at steps 100, 1000, 10,000; all three also at steps that are drawn, each kind in at most
            0.25 % of training's time. Where the model cannot be captured or verified, or gradients differ, two passes
            are made, with a warning. Default: ``False``.
        clock (str, optional): See :class:`.SubsetBackprop`. Default: ``"duration"``.

    Raises:
        ValueError: If a value is out of range, or ``reuse_activations`` goes with a selection pass of its own.
    """

    two_passes = True

    def __init__(
        self,
        start: float = 0.5,
        end: float = 0.9,
        keep: float = 0.5,
        scale_factor: float = 1.0,
        interrupt: int = 2,
        input_key: Any = 0,
        target_key: Any = 1,
        loss_fn: LossFn | None = None,
        selection_microbatch_size: int | str | None = None,
        selection_precision: str | Precision | None = None,
        reuse_activations: bool = False,
        clock: Clock = "duration",
    ) -> None:
        super().__init__(start, end, keep, interrupt, input_key, target_key, clock)
        check_scale_factor(scale_factor)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of (outputs, batch), got {type(loss_fn).__name__}.")
        size = selection_microbatch_size
        if not (size is None or size == "auto" or (isinstance(size, int) and not isinstance(size, bool) and size > 0)):
            raise ValueError(
                f"selection_microbatch_size must be a positive number of samples, 'auto', or None for the training "
                f"step's; got {size!r}."
            )
        precisions = [precision.value for precision in Precision]
        if (
            selection_precision is not None
            and getattr(selection_precision, "value", selection_precision) not in precisions
        ):
            raise ValueError(
                f"selection_precision must be one of {', '.join(precisions)}, or None for the training step's; "
                f"got {selection_precision!r}."
            )
        self.scale_factor = scale_factor
        self.loss_fn = loss_fn
        self.selection_microbatch_size = size
        self.selection_precision = None if selection_precision is None else Precision(selection_precision)
        if not isinstance(reuse_activations, bool):
            raise TypeError(f"reuse_activations must be True or False, got {reuse_activations!r}.")
        if reuse_activations and (scale_factor != 1 or size is not None or selection_precision is not None):
            raise ValueError(
                "reuse_activations=True makes the selection pass the training step's own forward pass, over the whole "
                "minibatch: leave scale_factor, selection_microbatch_size and selection_precision at their defaults."
            )
        self.reuse_activations = reuse_activations
        self._single_pass: SinglePass | None = None
        self._makes_two_passes = not reuse_activations

    def _reset(self) -> None:
        #: What a checkpoint says of the loss's scale.
        self._known_scale: dict[str, Any] = {}
        super()._reset()
        self._fitting_size: int | None = None

    def _reset_fit(self) -> None:
        super()._reset_fit()
        #: Parameters that a forward pass changes, and the number of passes that were made.
        self._changing: list[nn.Parameter] = []
        self._passes = 0
        self._put_back: Callable[[], None] | None = None
        self._scale = LossScale()
        self._scale.load_state_dict(self._known_scale)
        self._batch_of_loss: GivenBatch | None = None
        self._moment_of_loss: Moment | None = None
        #: Whether the model's loss draws random numbers, or changes its buffers or attributes.
        self._loss_leaves_traces = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the algorithm."""
        return {**super().state_dict(), "loss_scale": self._scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._known_scale = state.get("loss_scale", {})
        self._scale.load_state_dict(self._known_scale)

    def match(self, event: Event, state: State) -> bool:
        """Whether to run: see :class:`.Algorithm`."""
        if event == Event.AFTER_TRAIN_BATCH:
            return self._single_pass is not None and self._single_pass.installed
        return super().match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Runs the part of the algorithm that belongs to an event: see :class:`.Algorithm`."""
        if event == Event.FIT_START:
            if sys.modules.get("composer_gradmatch.reuse.single_pass") is not None:
                _import_single_pass().release_model(unwrap(state.model))
            if self._single_pass is not None:
                self._single_pass.release()
            self._single_pass, self._makes_two_passes = None, not self.reuse_activations
        if event == Event.AFTER_TRAIN_BATCH:
            assert self._single_pass is not None
            self._single_pass.release()
            if self._single_pass.missed is not None:
                self._make_two_passes(self._single_pass.missed)
            return
        super().apply(event, state, logger)

    def _after_dataloader(self, state: State, logger: Logger) -> None:
        if self._single_pass is not None:
            self._single_pass.release()  # Of a step that an error has ended.
        try:
            super()._after_dataloader(state, logger)
        finally:
            if self._single_pass is not None:
                self._single_pass.abandon()  # The minibatch is trained whole.

    def _once(
        self, state: State, num_samples: int, visit: Callable[[SinglePass, torch.Tensor], Result]
    ) -> Result | None:
        """What ``visit`` makes of the step's one forward pass and the samples' losses; None where two are made."""
        if self._makes_two_passes:
            return None
        try:
            model = unwrap(state.model)
            if needs_all_ranks(model):
                raise UnsupportedError("its forward passes are ones of all ranks (FSDP, SyncBatchNorm)")
            if any(algorithm.backwards_create_graph for algorithm in state.algorithms):
                raise UnsupportedError("another algorithm wants the graph of the backward pass itself")
            if self._single_pass is None:
                make = _import_single_pass()
                self._single_pass = make(model, lambda: self._precision(state), self._watched_layer(state))
            with span("selection_forward"):
                outputs = self._single_pass.forward(state.batch, num_samples)
            with self._single_pass.no_trace(), self._precision(state):
                # Of a copy, since a loss may change its batch in place.
                batch = copy_batch(state.batch)
                losses = self._losses_of(model, outputs, batch, num_samples)
            return visit(self._single_pass, losses)
        except UndecidedError as error:
            self._make_two_passes_now(error)
            return None
        except UnsupportedError as error:
            self._make_two_passes(str(error))
            return None

    def _watched_layer(self, state: State) -> nn.Linear | None:
        """The layer whose inputs and output gradients the selection needs."""
        return None

    def _after_selection(self, state: State, selection: Picks) -> None:
        single = self._single_pass
        if single is None or not single.pending:
            return
        n = len(selection.indices)

        def losses(outputs: Any, batch: Any) -> torch.Tensor:
            return per_sample_losses(unwrap(state.model), outputs, batch, n, self.loss_fn)

        try:
            single.serve(selection.indices, state.batch, selection.weights, losses)
            for failure in single.compile_failures:
                self._warn_once(f"Inductor cannot compile the reused pass, which runs uncompiled: {failure}.")
        except UndecidedError as error:
            self._make_two_passes_now(error)
        except UnsupportedError as error:
            self._make_two_passes(str(error))

    def _make_two_passes_now(self, error: UndecidedError) -> None:
        """Says that one minibatch showed too little of a pass to reuse it."""
        self._warn_once(f"two forward passes are made until one can be verified: {error}.")

    def _make_two_passes(self, reason: str) -> None:
        """Gives up reusing activations for the rest of the run."""
        if self._single_pass is not None:
            self._single_pass.abandon()
        self._single_pass, self._makes_two_passes = None, True
        self._warn_once(
            f"the activations of the selection pass cannot be used in the backward pass, so two forward passes are "
            f"made: {reason}."
        )

    def _estimated_cost(self, num_samples: int, num_picks: int) -> float:
        if self._single_pass is not None and self._single_pass.installed:
            return (num_samples / 3 + 2 * num_picks / 3) / num_samples
        return super()._estimated_cost(num_samples, num_picks)

    def _check_setup(self, state: State) -> None:
        super()._check_setup(state)
        if self.loss_fn is None:
            check_losses(unwrap(state.model))
        if 2 / 3 <= self.keep < 1 and not self.reuse_activations:
            warnings.warn(
                f"{type(self).__name__} with keep={self.keep} costs more than training on everything: a selection "
                f"pass of M/3 and a step on m samples against M is {1 / 3 + self.keep:.2f}. "
                "Only below keep=2/3 does it save time.",
                stacklevel=2,
            )

    def _check_first_batch(self, state: State) -> None:
        super()._check_first_batch(state)
        check_batch(unwrap(state.model), state.batch, self.loss_fn)

    def _rehearse(self, state: State, num_samples: int, num_picks: int) -> None:
        """Makes a selection pass as each step will, sees what it changes, and shows that its rows are the samples."""
        with self._watched(state):
            self._look(state, num_samples, num_picks)
        batch, few = self._few(state)
        if not self._shows_rows(state, batch, few):
            return
        with torch.no_grad(), self._no_trace(state):
            before = Generators.now()
            self._forward(state, copy_batch(batch), few)
            deterministic = before.is_now()
        check_rows(self._rows_of(state, batch, few), few, deterministic, self._remedy_for_rows)

    def _shows_rows(self, state: State, batch: Any, num_samples: int) -> bool:
        """Checks the losses of a small batch's samples; returns whether they can show which rows are whose."""
        return True

    #: What to do where rows are not samples.
    _remedy_for_rows = (
        "Selection needs the samples first, in the batch's order, in what the model returns and in its losses. Put "
        "them there, or use RandomBackprop, which looks at nothing."
    )

    @abstractmethod
    def _look(self, state: State, num_samples: int, num_picks: int) -> None:
        """Makes the selection pass of a step and what follows it, for what may fail."""

    @abstractmethod
    def _rows_of(self, state: State, batch: Any, num_samples: int) -> Rows:
        """What selection looks at, of the samples of a small batch with the given numbers."""

    def _few(self, state: State) -> tuple[Any, int]:
        """Some samples of the batch, for what takes more memory than selection does, and their number."""
        num_samples = count_samples(state.batch, self.input_key, self.target_key)
        few = min(self._selection_size(state, num_samples), max(8, self._ghost_batch_size))
        if needs_all_ranks(unwrap(state.model)):
            few = -largest_on_all_ranks(-few, state.device)
        return self._take(state.batch, slice(few), num_samples), few

    def _take(self, batch: Any, indices: torch.Tensor | slice, num_samples: int) -> Any:
        """A copy of some samples, which a forward pass or a loss may change as it likes."""
        return copy_batch(take_samples(batch, indices, num_samples, self._not_per_sample))

    @contextmanager
    def _no_trace(self, state: State) -> Iterator[None]:
        """Puts the model and the generators back after a selection pass, also the parameters that it is seen to change.

        Each pass is watched for what can be seen for nothing; the 10th, 100th, 1000th, ... as the first one: with all
        parameters compared.
        """
        self._passes += 1
        thorough = self._passes >= 10 and str(self._passes).strip("0") == "1"
        with self._watched(state) if thorough else nullcontext():
            with no_trace(unwrap(state.model), self._changing) as traces:
                self._put_back = traces.restore
                yield
            self._note_changes(traces.changed_parameters(), too_late=self._rehearsed and not thorough)

    @contextmanager
    def _watched(self, state: State) -> Iterator[None]:
        """Finds the parameters that a pass changes by their contents, and puts them back."""
        model = unwrap(state.model)
        if is_sharded(model):
            yield
            return
        contents = ParameterContents(model.parameters(), on_host=state.device.name == "gpu")
        try:
            yield
        finally:
            self._note_changes(contents.changed())
            contents.restore()

    def _note_changes(self, changed: Sequence[nn.Parameter], too_late: bool = False) -> None:
        """Remembers parameters that a pass changes, to put them back after each from now on."""
        known = set(map(id, self._changing))
        new = [each for each in changed if id(each) not in known]
        self._changing += new
        if new and too_late:
            self._warn_once(
                "a forward pass has begun to change parameters of the model; they are put back after each selection "
                "pass from now on, but were not after that one."
            )

    def _precision(self, state: State) -> AbstractContextManager[None]:
        """The precision of the selection pass."""
        if self.selection_precision is None:
            return get_precision_context(state.precision, state.precision_config)
        return precision_context(self.selection_precision, state.device, state.precision_config)

    def _selection_size(self, state: State, num_samples: int) -> int:
        size = self.selection_microbatch_size
        if size is None:
            size = state.device_train_microbatch_size
        wanted = num_samples if size is None or isinstance(size, str) else max(1, int(size))
        return min(wanted, num_samples, self._fitting_size or num_samples)

    def _in_microbatches(self, state: State, num_samples: int, visit: Callable[[Any, int], Result]) -> list[Result]:
        """What ``visit`` makes of each microbatch of ``state.batch`` and its number of samples, in their order.

        Where memory runs out and the size is automatic, starts again with microbatches of half the size.
        """
        automatic = self.selection_microbatch_size == "auto" or (
            self.selection_microbatch_size is None and state.auto_microbatching
        )
        while True:
            size = self._selection_size(state, num_samples)
            try:
                parts = self._microbatches(state, num_samples, size)
                visited = []
                for part, n, counts in parts:
                    if visited and self._put_back is not None:
                        self._put_back()  # All parts of the minibatch are seen by the same model.
                    visited.append((visit(part, n), counts))
            except torch.OutOfMemoryError as error:
                if not automatic or size == 1 or needs_all_ranks(unwrap(state.model)):
                    raise RuntimeError(
                        f"Memory ran out in the selection pass of {type(self).__name__}, with {size} samples at a "
                        "time. Lower selection_microbatch_size, or set it to 'auto' (not under FSDP)."
                    ) from error
                self._fitting_size = (size + 1) // 2
            else:
                return [result for result, counts in visited if counts]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _microbatches(self, state: State, num_samples: int, size: int) -> Iterator[tuple[Any, int, bool]]:
        """Parts of the batch, their numbers of samples, and whether they count.

        As few as ``size`` allows, and as even, for layers that dislike a small rest. Where a forward pass is
        one of all ranks (FSDP gathers parameters in it), all make the same number of them.
        """
        passes = -(-num_samples // size)
        if passes > 1 and num_samples // passes == 1 and fewest_in_a_microbatch(unwrap(state.model)) > 1:
            passes = num_samples // 2  # Batch normalisation takes no single sample.
        if needs_all_ranks(unwrap(state.model)):
            passes = largest_on_all_ranks(passes, state.device)
        for i in range(passes):
            begin, end = i * num_samples // passes, (i + 1) * num_samples // passes
            counts = begin < end
            rows = slice(begin, end) if counts else slice(0, 1)
            yield self._take(state.batch, rows, num_samples), (end - begin) if counts else 1, counts

    def _forward(self, state: State, batch: Any, num_samples: int) -> tuple[Any, torch.Tensor]:
        """The model's outputs on a batch, scaled down, and its samples' losses, in the selection pass's precision."""
        model = unwrap(state.model)
        batch = scale_inputs(batch, self.input_key, self.scale_factor)
        with span("selection_forward"), self._precision(state):
            outputs = self._outputs_of(model, batch)
            return outputs, self._losses_of(model, outputs, batch, num_samples)

    def _outputs_of(self, model: nn.Module, batch: Any) -> Any:
        try:
            return model(batch)
        except RuntimeError as error:
            if self.scale_factor == 1 or isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
                raise
            raise ValueError(
                f"The model failed on inputs downsampled by scale_factor={self.scale_factor}: {error}. If it takes "
                "one size only, leave scale_factor at 1."
            ) from error
        except IndexError as error:
            raise self._explained(error, batch) from error

    def _losses_of(self, model: nn.Module, outputs: Any, batch: Any, num_samples: int) -> torch.Tensor:
        try:
            return per_sample_losses(model, outputs, batch, num_samples, self.loss_fn)
        except IndexError as error:
            raise self._explained(error, batch) from error

    def _explained(self, error: IndexError, batch: Any) -> Exception:
        """What an index that is out of range most often comes from."""
        return ValueError(
            f"The selection pass failed: {error} The targets are {describe_targets(batch, self.target_key)}. If that "
            "is a class outside [0, C), correct the data set's labels or the model's number of classes; tokens must be "
            "below the size of the vocabulary."
        )

    def _before_loss(self, state: State) -> None:
        """Keeps what the model's own loss is given, which may change it."""
        self._batch_of_loss = GivenBatch(state.batch)
        self._moment_of_loss = Moment.now(unwrap(state.model)) if self._loss_leaves_traces else None

    def _after_loss(self, state: State) -> None:
        """Replaces the loss of a microbatch by its weighted loss; in a rehearsal, for nothing but its errors."""
        assert self._microbatch_weights is not None
        assert self._batch_of_loss is not None
        weights, model = self._microbatch_weights, unwrap(state.model)
        batch = self._batch_of_loss.again(state.batch)
        own_loss = cast(torch.Tensor, state.loss)
        with (
            get_precision_context(state.precision, state.precision_config),
            back_at(model, self._moment_of_loss),
        ):
            losses = per_sample_losses(model, state.outputs, batch, len(weights), self.loss_fn)
            scale = self._scale.read(
                losses, own_loss.mean(), differentiable_outputs(state.outputs), self._recomputed_loss(state, batch)
            )
            loss = weighted_loss(losses, weights, own_loss, scale)
        self._batch_of_loss = self._moment_of_loss = None
        self._weighed = True
        if self._rehearsing:
            return
        state.loss = loss
        outputs: Any = state.outputs
        if isinstance(outputs, MutableMapping) and outputs.get("loss") is own_loss:
            outputs["loss"] = own_loss.detach()  # Its graph would be kept through the backward pass.

    def _recomputed_loss(self, state: State, batch: Any) -> Iterator[torch.Tensor]:
        """A HuggingFace model's own loss from its logits: compiled, it returns one that does not depend on them."""
        model = unwrap(state.model)
        if takes_loss_from_logits(model):
            yield huggingface_losses(model, state.outputs, batch, reduction="mean")

    def _batch_end(self, state: State) -> None:
        step = str(int(state.timestamp.batch))
        due = state.device.name != "gpu" or step.strip("0") == "1"
        if due and self._scale.other_terms is not None and bool(self._scale.other_terms):
            self._warn_once(
                "the model's own loss has a term that depends on its outputs and is not in the samples' losses "
                "(loss_fn, or loss(..., reduction='none')). It is trained without weights."
            )
