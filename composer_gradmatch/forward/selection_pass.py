"""The forward pass that only looks: over the whole minibatch, in microbatches, in a precision, without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from composer.core import Precision, State, get_precision_context
from torch import nn

from composer_gradmatch.batches import describe_targets
from composer_gradmatch.batches.reader import BatchReader
from composer_gradmatch.forward.batch_norm import fewest_in_a_microbatch
from composer_gradmatch.forward.compiled import eagerly
from composer_gradmatch.forward.composer_private import ghost_batch_size
from composer_gradmatch.forward.losses import LossFn, per_sample_losses
from composer_gradmatch.forward.precision import precision_context
from composer_gradmatch.forward.ranks import is_sharded, largest_on_all_ranks, needs_all_ranks, unwrap
from composer_gradmatch.forward.scaling import check_scale_factor, scale_inputs
from composer_gradmatch.forward.torch_private import is_from_cuda
from composer_gradmatch.forward.traceless import no_trace
from composer_gradmatch.forward.traces import ParameterContents
from composer_gradmatch.spans import span

__all__ = ["SelectionPass"]

Result = TypeVar("Result")

#: How many samples are looked at in what takes more memory than selection does.
_FEW = 8


class SelectionPass:
    """Makes the forward passes of a selection.

    Args:
        reader (BatchReader): Reads the batches.
        warn (Callable): Warns once a run.
        owner (str): The algorithm that it is for, for the messages.
        loss_fn (Callable, optional): A function of (outputs, batch) that returns the loss of each sample, shape
            (M,); see :func:`.per_sample_losses` for what is asked without one. Default: ``None``.
        scale_factor (float, optional): Scale for downsampling the inputs, in (0, 1]. Default: ``1.0``.
        microbatch_size (int | str, optional): Samples at a time; ``None`` for as many as in the training step;
            ``"auto"`` for all, and half as many whenever memory runs out, which ``None`` also does where the Trainer's
            own microbatch size is ``"auto"``. Default: ``None``.
        precision (str | Precision, optional): ``None`` for the training step's. Default: ``None``.

    Raises:
        TypeError: If ``loss_fn`` is no function.
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        reader: BatchReader,
        warn: Callable[[str], None],
        owner: str,
        loss_fn: LossFn | None = None,
        scale_factor: float = 1.0,
        microbatch_size: int | str | None = None,
        precision: str | Precision | None = None,
    ) -> None:
        check_scale_factor(scale_factor)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of (outputs, batch), got {type(loss_fn).__name__}.")
        size = microbatch_size
        if not (size is None or size == "auto" or (isinstance(size, int) and not isinstance(size, bool) and size > 0)):
            raise ValueError(
                f"selection_microbatch_size must be a positive number of samples, 'auto', or None for the training "
                f"step's; got {size!r}."
            )
        precisions = [each.value for each in Precision]
        if precision is not None and getattr(precision, "value", precision) not in precisions:
            raise ValueError(
                f"selection_precision must be one of {', '.join(precisions)}, or None for the training step's; "
                f"got {precision!r}."
            )
        self.reader, self.warn, self.owner = reader, warn, owner
        self.loss_fn, self.scale_factor, self.microbatch_size = loss_fn, scale_factor, size
        self.precision_name = None if precision is None else Precision(precision)
        self.reset()

    def reset(self) -> None:
        """Forgets what belongs to one Trainer."""
        #: The samples that were seen to fit into memory.
        self._fitting_size: int | None = None
        self.reset_fit()

    def reset_fit(self) -> None:
        """Forgets what belongs to one ``fit``, in which modules may be replaced."""
        #: Whether the first batch has shown what a pass changes.
        self.rehearsed = False
        #: Parameters that a forward pass changes, and the number of passes that were made.
        self._changing: list[nn.Parameter] = []
        self._passes = 0
        self._put_back: Callable[[], None] | None = None

    @contextmanager
    def no_trace(self, state: State) -> Iterator[None]:
        """Puts the model and the generators back after a pass, also the parameters that it is seen to change.

        Each pass is watched for what can be seen for nothing; the 10th, 100th, 1000th, ... as the first one: with all
        parameters compared.
        """
        self._passes += 1
        thorough = self._passes >= 10 and str(self._passes).strip("0") == "1"
        with self.watched(state) if thorough else nullcontext():
            with no_trace(unwrap(state.model), self._changing) as traces:
                self._put_back = traces.restore
                yield
            self._note_changes(traces.changed_parameters(), too_late=self.rehearsed and not thorough)

    @contextmanager
    def watched(self, state: State) -> Iterator[None]:
        """Finds the parameters that a pass changes by their contents, and puts them back."""
        model = unwrap(state.model)
        if is_sharded(model.modules()):
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
            self.warn(
                "a forward pass has begun to change parameters of the model; they are put back after each selection "
                "pass from now on, but were not after that one."
            )

    def precision(self, state: State) -> AbstractContextManager[None]:
        """Gives the precision of the pass."""
        if self.precision_name is None:
            return get_precision_context(state.precision, state.precision_config)
        return precision_context(self.precision_name, state.device, state.precision_config)

    def few(self, state: State) -> tuple[Any, int]:
        """Copies some samples of the batch, for what takes more memory than selection does, and tells their number."""
        model = unwrap(state.model)
        num_samples = self.reader.count(state.batch)
        few = min(self._size(state, num_samples), max(_FEW, ghost_batch_size(model)))
        if needs_all_ranks(model):
            few = -largest_on_all_ranks(-few, state.device)
        return self.reader.copy_of(state.batch, slice(few), num_samples), few

    @torch.no_grad()
    def forward_few(self, state: State) -> None:
        """Runs the model on some samples of the batch, for what that changes."""
        batch, few = self.few(state)
        with self.no_trace(state):
            self.forward(state, batch, few)

    def _size(self, state: State, num_samples: int) -> int:
        size = self.microbatch_size
        if size is None:
            size = state.device_train_microbatch_size
        wanted = num_samples if size is None or isinstance(size, str) else max(1, int(size))
        return min(wanted, num_samples, self._fitting_size or num_samples)

    def smallest_microbatch(self, state: State, num_samples: int) -> int:
        """Tells the size of the smallest microbatch of a pass over some of the batch's samples.

        Args:
            state (State): The run's state.
            num_samples (int): How many.
        """
        return num_samples // -(-num_samples // self._size(state, num_samples))

    def in_microbatches(self, state: State, num_samples: int, visit: Callable[[Any, int], Result]) -> list[Result]:
        """Lists what ``visit`` makes of each microbatch of ``state.batch`` and its number of samples, in their order.

        Where memory runs out and the size is automatic, starts again with microbatches of half the size.

        Raises:
            RuntimeError: If memory runs out all the same.
        """
        automatic = self.microbatch_size == "auto" or (self.microbatch_size is None and state.auto_microbatching)
        while True:
            size = self._size(state, num_samples)
            try:
                visited = []
                for part, n, counts in self._microbatches(state, num_samples, size):
                    if visited and self._put_back is not None:
                        self._put_back()  # All parts of the minibatch are seen by the same model.
                    visited.append((visit(part, n), counts))
            except torch.OutOfMemoryError as error:
                if not automatic or size == 1 or needs_all_ranks(unwrap(state.model)):
                    raise RuntimeError(
                        f"Memory ran out in the selection pass of {self.owner}, with {size} samples at a time. Lower "
                        "selection_microbatch_size, or set it to 'auto' (not under FSDP)."
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
            yield self.reader.copy_of(state.batch, rows, num_samples), (end - begin) if counts else 1, counts

    def forward(self, state: State, batch: Any, num_samples: int) -> tuple[Any, torch.Tensor]:
        """Runs the model on a batch, scaled down: its outputs, and its samples' losses, shape (n,)."""
        batch = self.scaled(batch)
        with span("selection_forward"), self.precision(state):
            outputs = self.outputs_of(state, batch)
            return outputs, self.losses_of(state, outputs, batch, num_samples)

    def scaled(self, batch: Any) -> Any:
        """Scales a batch's inputs down."""
        return scale_inputs(batch, self.reader.input_key, self.scale_factor)

    def outputs_of(self, state: State, batch: Any) -> Any:
        """Runs the model on a batch as it is; a compiled one uncompiled in a rehearsal, of sizes that no step has.

        Raises:
            ValueError: If it fails on inputs that were scaled down, or by an index that is out of range.
        """
        model = unwrap(state.model)
        try:
            with nullcontext() if self.rehearsed else eagerly(model):
                return model(batch)
        except RuntimeError as error:
            if self.scale_factor == 1 or isinstance(error, torch.OutOfMemoryError) or is_from_cuda(error):
                raise
            raise ValueError(
                f"The model failed on inputs downsampled by scale_factor={self.scale_factor}: {error}. If it takes "
                "one size only, leave scale_factor at 1."
            ) from error
        except IndexError as error:
            raise self._explained(error, batch) from error

    def losses_of(self, state: State, outputs: Any, batch: Any, num_samples: int) -> torch.Tensor:
        """Computes the losses of a batch's samples, shape (n,): see :func:`.per_sample_losses`.

        Raises:
            ValueError: Also if it fails by an index that is out of range.
        """
        try:
            return per_sample_losses(unwrap(state.model), outputs, batch, num_samples, self.loss_fn)
        except IndexError as error:
            raise self._explained(error, batch) from error

    def _explained(self, error: IndexError, batch: Any) -> Exception:
        """Tells what an index that is out of range most often comes from."""
        targets = describe_targets(batch, self.reader.target_key)
        return ValueError(
            f"The selection pass failed: {error} The targets are {targets}. If that is a class outside [0, C), correct "
            "the data set's labels or the model's number of classes; tokens must be below the size of the vocabulary."
        )
