"""Loss-based selection: the sampling of Jiang et al. (2019), in Composer's variant and with their history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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
        beta (float, optional): The selectivity β. ``None`` takes Composer's 1/keep − 1, which makes the mean
            probability of a sample keep; the paper's text has M/m = 1/keep. Default: ``None``.
        history (int, optional): R, the number of recent losses to rank by; 0 ranks within the minibatch.
            Default: ``0``.

    All other arguments are those of :class:`.RuleBackprop`.

    Raises:
        ValueError: If a value is out of range.

    Example:
        .. code-block:: python

            trainer = Trainer(..., algorithms=[LossBackprop(start=0.0, end=1.0, keep=0.3, interrupt=0)])
    """

    log_name = RULES["loss_backprop"].name

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
        refresh: str | None = None,
        sample_id_key: Any = None,
        store_device: Literal["cpu", "gpu"] = "cpu",
        store_limit: float = 2.0,
        suspects: bool | Mapping[str, Any] = False,
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
            refresh=refresh,
            sample_id_key=sample_id_key,
            store_device=store_device,
            store_limit=store_limit,
            suspects=suspects,
            options={"beta": self.beta, "history": history},
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, also in version 0.1.0."""
        if "recent_losses" in state:
            state = {**state, "rule": [{"recent": recent} for recent in state["recent_losses"]]}
        super().load_state_dict(state)
