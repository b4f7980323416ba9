"""What the algorithms share that select by a forward pass of their own over the whole minibatch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from composer.core import Precision, State, get_precision_context

from composer_gradmatch.batches import describe_targets, take_samples
from composer_gradmatch.losses import LossFn, check_batch, check_losses, per_sample_losses, weighted_loss
from composer_gradmatch.selection_pass import (
    check_scale_factor,
    largest_on_all_ranks,
    needs_all_ranks,
    precision_context,
    scale_inputs,
    unwrap,
)
from composer_gradmatch.spans import span
from composer_gradmatch.subset_backprop import SubsetBackprop

__all__ = ["TwoPassBackprop"]

Result = TypeVar("Result")


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

    Raises:
        ValueError: If a value is out of range.
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
    ) -> None:
        super().__init__(start, end, keep, interrupt, input_key, target_key)
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
        self._fitting_size: int | None = None

    def _check_setup(self, state: State) -> None:
        super()._check_setup(state)
        if self.loss_fn is None:
            check_losses(unwrap(state.model))
        if 2 / 3 <= self.keep < 1:
            warnings.warn(
                f"{type(self).__name__} with keep={self.keep} costs more than training on everything: a selection "
                f"pass of M/3 and a step on m samples against M is {1 / 3 + self.keep:.2f}. "
                "Only below keep=2/3 does it save time.",
                stacklevel=2,
            )

    def _rehearse(self, state: State, num_samples: int, num_picks: int) -> None:
        """Checks the first batch's labels, too: what they break in a model's forward pass names nothing."""
        check_batch(unwrap(state.model), state.batch, self.loss_fn)

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
                visited = [(visit(part, n), counts) for part, n, counts in parts]
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

    @staticmethod
    def _microbatches(state: State, num_samples: int, size: int) -> Iterator[tuple[Any, int, bool]]:
        """Parts of the batch, their numbers of samples, and whether they count.

        As few as ``size`` allows, and as even, for layers that dislike a small rest. Where a forward pass is
        one of all ranks (FSDP gathers parameters in it), all make the same number of them.
        """
        passes = -(-num_samples // size)
        if needs_all_ranks(unwrap(state.model)):
            passes = largest_on_all_ranks(passes, state.device)
        for i in range(passes):
            begin, end = i * num_samples // passes, (i + 1) * num_samples // passes
            counts = begin < end
            rows = slice(begin, end) if counts else slice(0, 1)
            yield take_samples(state.batch, rows, num_samples), (end - begin) if counts else 1, counts

    def _forward(self, state: State, batch: Any, num_samples: int) -> tuple[Any, torch.Tensor]:
        """The model's outputs on a batch, scaled down, and its samples' losses, in the selection pass's precision."""
        model = unwrap(state.model)
        batch = scale_inputs(batch, self.input_key, self.scale_factor)
        with span("selection_forward"), self._precision(state):
            try:
                outputs = model(batch)
            except RuntimeError as error:
                if self.scale_factor == 1 or isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
                    raise
                raise ValueError(
                    f"The model failed on inputs downsampled by scale_factor={self.scale_factor}: {error}. If it takes "
                    "one size only, leave scale_factor at 1."
                ) from error
            except IndexError as error:
                raise self._explained(error, batch) from error
            try:
                return outputs, per_sample_losses(model, outputs, batch, num_samples, self.loss_fn)
            except IndexError as error:
                raise self._explained(error, batch) from error

    def _explained(self, error: IndexError, batch: Any) -> Exception:
        """What an index that is out of range most often comes from."""
        return ValueError(
            f"The selection pass failed: {error} The targets are {describe_targets(batch, self.target_key)}. If that "
            "is a class outside [0, C), correct the data set's labels or the model's number of classes; tokens must be "
            "below the size of the vocabulary."
        )

    def _after_loss(self, state: State) -> None:
        assert self._microbatch_weights is not None
        weights = self._microbatch_weights
        with get_precision_context(state.precision, state.precision_config):
            model = unwrap(state.model)
            losses = per_sample_losses(model, state.outputs, state.batch, len(weights), self.loss_fn)
            own_loss = cast(torch.Tensor, state.loss)
            state.loss = weighted_loss(losses, weights, own_loss)
        outputs: Any = state.outputs
        if isinstance(outputs, MutableMapping) and outputs.get("loss") is own_loss:
            outputs["loss"] = own_loss.detach()  # Its graph would be kept through the backward pass.
