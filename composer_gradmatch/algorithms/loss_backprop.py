"""Loss-based selection: the sampling of Jiang et al. (2019), in Composer's variant and with their history."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Precision, State
from composer.utils import dist

from composer_gradmatch.algorithms.schedule import Clock
from composer_gradmatch.algorithms.subset_backprop import Picks, WholeBatch
from composer_gradmatch.algorithms.two_pass_backprop import TwoPassBackprop
from composer_gradmatch.batches import copy_batch, map_tensors
from composer_gradmatch.forward.losses import LossFn
from composer_gradmatch.forward.sample_checks import Rows, check_independence, normalised_by_running_statistics
from composer_gradmatch.forward.traceless import scale_inputs, unwrap

__all__ = ["LossBackprop", "loss_percentiles", "select_by_percentile"]


def loss_percentiles(losses: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """CDF(l) of each loss under the empirical distribution of a history, at the middle of its steps.

    With the losses themselves as the history these are the (rank + ½)/M of Composer's ``SelectiveBackprop``,
    but for equal losses, which share theirs.

    Args:
        losses (torch.Tensor): Shape (M,).
        history (torch.Tensor): Shape (R,), R > 0.

    Returns:
        torch.Tensor: Values in [0, 1], float64, shape (M,); positive for a loss that is part of the history.
    """
    ordered = history.sort().values
    below = torch.searchsorted(ordered, losses, side="left")
    up_to = torch.searchsorted(ordered, losses, side="right")
    return (below + up_to).double() / (2 * len(history))


def select_by_percentile(percentiles: torch.Tensor, num_picks: int, beta: float) -> torch.Tensor:
    """Picks samples without replacement with probabilities in proportion to percentile^β, with torch's generator.

    The largest of β·log(percentile) + Gumbel noise are a sequential draw without replacement, and unlike the
    probabilities themselves they do not underflow for large β.

    Args:
        percentiles (torch.Tensor): Values in (0, 1], shape (M,).
        num_picks (int): m, at most M.
        beta (float): The selectivity β ≥ 0; 0 is uniform sampling.

    Returns:
        torch.Tensor: The picks in the order drawn, int64, shape (m,).
    """
    noise = -torch.empty(len(percentiles), dtype=torch.float64).exponential_().log()
    return torch.topk(beta * percentiles.double().log() + noise, num_picks).indices


class LossBackprop(TwoPassBackprop):
    """Backpropagates a part of each minibatch that is drawn in favour of high losses (Jiang et al., 2019).

    By default this is the sampling of Composer's ``SelectiveBackprop``: probabilities in proportion to
    ((rank + ½)/M)^β. With ``history=R`` the rank within the minibatch gives way to the rank among the R most recent
    losses seen on this rank, as in the original paper, still picking exactly m. Unlike Composer's, the selection
    pass leaves BatchNorm's statistics alone, draws come from torch's generator (and so resume from a
    checkpoint), and a small last minibatch keeps at least one sample. With mosaicml-streaming data sets Composer
    does not restore the generators in mid-epoch, so there the draws do not resume.

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
        loss_fn (Callable, optional): A function of (outputs, batch) that returns the loss of each sample, shape
            (M,). ``None`` asks the model's own ``loss(..., reduction='none')`` or, for a ``HuggingFaceModel``, takes
            the loss of its task from its logits and labels. Default: ``None``.
        beta (float, optional): The selectivity β. ``None`` takes Composer's 1/keep − 1, which makes the mean
            probability of a sample keep; the paper's text has M/m = 1/keep. Default: ``None``.
        history (int, optional): R, the number of recent losses to rank by; 0 ranks within the minibatch.
            Default: ``0``.
        selection_microbatch_size (int | str, optional): Samples at a time in the selection pass: a number, ``"auto"``,
            or ``None`` for the training step's; see :class:`.TwoPassBackprop`. Default: ``None``.
        selection_precision (str | Precision, optional): The precision of the selection pass, e.g. ``"amp_bf16"``;
            ``None`` for the training step's. Default: ``None``.
        reuse_activations (bool, optional): Whether to make one forward pass instead of two; see
            :class:`.TwoPassBackprop`. Default: ``False``.
        clock (str, optional): ``"batch"`` counts batches within an epoch, too, for ``start`` and ``end``; see
            :class:`.SubsetBackprop`. Default: ``"duration"``.

    Raises:
        ValueError: If a value is out of range.

    Example:
        .. code-block:: python

            trainer = Trainer(..., algorithms=[LossBackprop(start=0.0, end=1.0, keep=0.3, interrupt=0)])
    """

    log_name = "loss_backprop"

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
        loss_fn: LossFn | None = None,
        beta: float | None = None,
        history: int = 0,
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
        if beta is not None and not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be a number >= 0 (0 draws uniformly) or None for 1/keep - 1; got {beta}.")
        if isinstance(history, bool) or not isinstance(history, int) or history < 0:
            raise ValueError(
                f"history must be an integer >= 0, the number of recent losses to rank by; got {history!r}."
            )
        self.beta = 1 / keep - 1 if beta is None else beta
        self.history = history

    def _reset(self) -> None:
        super()._reset()
        self._recent = torch.empty(0, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the algorithm; ranks are gathered, since Composer saves that of rank 0."""
        state = super().state_dict()
        if self.history:
            state["recent_losses"] = dist.all_gather_object(self._recent)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        recent = state.get("recent_losses", [])
        if self.history and dist.get_global_rank() < len(recent):
            self._recent = recent[dist.get_global_rank()][-self.history :]

    @torch.no_grad()
    def _losses(self, state: State, num_samples: int) -> torch.Tensor:
        with self._no_trace(state):
            losses = self._in_microbatches(state, num_samples, lambda batch, n: self._forward(state, batch, n)[1])
        return torch.cat(losses).detach().to("cpu", torch.float64)

    def _look(self, state: State, num_samples: int, num_picks: int) -> None:
        self._losses(state, num_samples)

    def _rows_of(self, state: State, batch: Any, num_samples: int) -> Rows:

        @torch.no_grad()
        def rows(samples: torch.Tensor) -> dict[str, torch.Tensor]:
            with self._no_trace(state), normalised_by_running_statistics(unwrap(state.model)):
                _, losses = self._forward(state, self._take(batch, samples, num_samples), num_samples)
            return {"the losses": losses}

        return rows

    def _shows_rows(self, state: State, batch: Any, num_samples: int) -> bool:
        """Also warns if samples' losses depend on each other; then their rows show nothing."""
        model, leaves = unwrap(state.model), []

        def leaf_of(output: torch.Tensor) -> torch.Tensor:
            if not output.is_floating_point() or not output.dim() or len(output) != num_samples:
                return output
            leaves.append(output.detach().requires_grad_())
            return leaves[-1].clone()  # Which the loss may change in place.

        with self._no_trace(state):
            with torch.no_grad(), self._precision(state):
                batch = scale_inputs(copy_batch(batch), self.input_key, self.scale_factor)
                outputs = self._outputs_of(model, batch)
            with torch.enable_grad(), self._precision(state):
                losses = self._losses_of(model, map_tensors(leaf_of, outputs), batch, num_samples)
            mixed = losses.requires_grad and any(check_independence(losses, leaf) is not None for leaf in leaves)
        if mixed:
            self._warn_once(
                "the loss of a sample depends on the other samples' outputs (as contrastive losses do): samples are "
                "ranked by their losses in the whole minibatch, and trained by those among the picks alone."
            )
        return not mixed

    def _select(self, state: State, num_samples: int, num_picks: int) -> Picks | WholeBatch:
        once = self._once(state, num_samples, lambda _, losses: losses.detach().to("cpu", torch.float64))
        losses = self._losses(state, num_samples) if once is None else once
        if not losses.isfinite().all():
            return WholeBatch("a minibatch has losses that are not finite; it and others like it are trained whole.")
        if not self.history:
            order = torch.argsort(losses)
            ranks = torch.arange(0.5, num_samples, dtype=torch.float64) / num_samples
            return Picks(order[select_by_percentile(ranks, num_picks, self.beta)])
        # A minibatch larger than R is ranked within itself: each of its losses belongs to the distribution.
        recent = torch.cat([self._recent, losses])[-max(self.history, num_samples) :]
        self._recent = recent[-self.history :]
        return Picks(select_by_percentile(loss_percentiles(losses, recent), num_picks, self.beta))
