"""Loss-based selection: the sampling of Jiang et al. (2019), in Composer's variant and with their history."""

from __future__ import annotations

from typing import Any

from composer.core import Precision

from composer_gradmatch.algorithms.rule_backprop import RuleBackprop
from composer_gradmatch.algorithms.schedule import Clock
from composer_gradmatch.forward.losses import LossFn
from composer_gradmatch.rules.table import RULES

__all__ = ["LossBackprop"]


class LossBackprop(RuleBackprop):
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
            or ``None`` for the training step's; see :class:`.RuleBackprop`. Default: ``None``.
        selection_precision (str | Precision, optional): The precision of the selection pass, e.g. ``"amp_bf16"``;
            ``None`` for the training step's. Default: ``None``.
        reuse_activations (bool, optional): Whether to make one forward pass instead of two; see
            :class:`.RuleBackprop`. Default: ``False``.
        clock (str, optional): ``"batch"`` counts batches within an epoch, too, for ``start`` and ``end``; see
            :class:`.RuleBackprop`. Default: ``"duration"``.

    Raises:
        ValueError: If a value is out of range.

    Example:
        .. code-block:: python

            trainer = Trainer(..., algorithms=[LossBackprop(start=0.0, end=1.0, keep=0.3, interrupt=0)])
    """

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
        self.beta, self.history = (1 / keep - 1 if beta is None and keep else beta), history
        super().__init__(
            RULES["loss_backprop"],
            start,
            end,
            keep,
            scale_factor,
            interrupt,
            input_key,
            target_key,
            loss_fn=loss_fn,
            selection_microbatch_size=selection_microbatch_size,
            selection_precision=selection_precision,
            reuse_activations=reuse_activations,
            clock=clock,
            options={"beta": self.beta, "history": history},
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, also in version 0.1.0."""
        if "recent_losses" in state:
            state = {**state, "rule": [{"recent": recent} for recent in state["recent_losses"]]}
        super().load_state_dict(state)
