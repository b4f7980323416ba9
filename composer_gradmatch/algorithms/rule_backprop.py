"""Any rule as an algorithm of Composer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from composer.core import Precision
from torch import nn

from composer_gradmatch.algorithms.schedule import Clock
from composer_gradmatch.algorithms.selector import Selector
from composer_gradmatch.algorithms.subset_backprop import SubsetBackprop
from composer_gradmatch.batches.numbering import Numbering
from composer_gradmatch.candidates.one_pass import OnePass
from composer_gradmatch.candidates.refresh import check_refresh
from composer_gradmatch.candidates.source import Source
from composer_gradmatch.candidates.stored import StoredLooks
from composer_gradmatch.candidates.suspects import Suspects
from composer_gradmatch.candidates.two_passes import TwoPasses
from composer_gradmatch.candidates.watched_layer import WatchedLayer
from composer_gradmatch.forward.losses import LossFn
from composer_gradmatch.forward.selection_pass import SelectionPass
from composer_gradmatch.rules.rule import Rule, RuleFunction
from composer_gradmatch.rules.table import rule_named

__all__ = ["RuleBackprop"]


class RuleBackprop(SubsetBackprop):
    """Backpropagates the part of each minibatch that a rule picks, weighted as it says.

    The rule sees the samples' losses and last-layer gradients, from a forward pass that leaves the batch, buffers,
    parameters, modules' attributes and random number generators as they were. Its weights reach the loss of each
    microbatch as L + (1/Z)·Σᵢ(wᵢ − 1)ℓᵢ, which weighs the samples and leaves other terms as they are. A minibatch with
    losses or gradients that are not finite is trained whole.

    Args:
        rule (Callable | Rule | str): A function ``rule(candidates, m)`` that returns :class:`.Picks` or a pair
            (indices, weights), weights None for ones; a :class:`.Rule`, which also says what it looks at (a function
            alone is taken to need gradients and to give weights); or the name of one: see :func:`.rule_named`.
        start (float, optional): Start of selection as a fraction of training. Default: ``0.5``.
        end (float, optional): End of selection as a fraction of training. Default: ``0.9``.
        keep (float, optional): Fraction of the minibatch to keep, m = max(1, int(keep·M)). With 1 nothing is selected,
            unless the rule says itself how many to leave out (``Rule(varies=True)``: ``infobatch``, ``kakurenbo``) or
            there are suspects. Default: ``0.5``.
        scale_factor (float, optional): Scale for downsampling the inputs of the selection pass, in (0, 1].
            Default: ``1.0``.
        interrupt (int, optional): Every ``interrupt``-th batch is trained whole; 0 selects from all.
            Default: ``2``.
        input_key (str | int | tuple[Callable, Callable] | Any, optional): Where a batch has its inputs: a key or a
            pair of getter and setter. Default: ``0``.
        target_key (str | int | tuple[Callable, Callable] | Any, optional): The same for its targets. Default: ``1``.
        output_layer (str | nn.Module, optional): The layer whose gradients stand for the model's, an ``nn.Linear``,
            a convolution with a kernel of one element, or what has the weight of a matrix product: a dotted name or
            the module itself. ``None`` finds the one that put out what the model returns (its ``logits``, if
            it names them), or what that is made from by nothing learned. Its output must be its input times its
            weight plus its bias; where the loss goes through other parameters behind it, one that was found is an
            error, and one that was named a warning. Default: ``None``.
        loss_fn (Callable, optional): A function of (outputs, batch) that returns the loss of each sample, shape
            (M,). ``None`` asks the model's own ``loss(..., reduction='none')`` or, for a ``HuggingFaceModel``, takes
            the loss of its task from its logits and labels. Default: ``None``.
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
        clock (str, optional): What ``start`` and ``end`` are fractions of: ``"duration"`` counts in the unit of
            ``max_duration``, which in epochs are whole ones, as Composer's own algorithm does; ``"batch"`` counts
            batches within an epoch, too. Default: ``"duration"``.
        refresh (str, optional): How old a look at a sample may be, a time such as ``"5ep"`` or ``"500ba"``; ``None``
            looks in every step. With one, a sample is looked at when it was never seen or its last look is at least
            that old, its own training step counting as a look at the time of that step; what was seen of all others
            comes from a store, and a step in which nothing is due makes no pass. ``"1ep"`` picks and trains as
            ``None`` does where each sample is seen once an epoch. Samples must have numbers: see
            :func:`.number_samples`. Default: ``None``.
        sample_id_key (Any, optional): Where batches have numbers of their own, from 0 to N − 1: a key of a mapping or
            an index; ``None`` for those of :func:`.number_samples`. Default: ``None``.
        store_device (str, optional): Where the store is: ``"cpu"``, or ``"gpu"`` for the run's device.
            Default: ``"cpu"``.
        store_limit (float, optional): The most GiB for the output layer's inputs, which are kept in half precision.
            Above it a fixed random projection of them is kept. Default: ``2.0``.
        suspects (bool | Mapping, optional): Whether samples whose labels look wrong are left out of the candidates and
            of the mean gradient, with a store: ``True``, or ``{"margin": 0.4, "after": "2ep", "decay": 0.7}``: see
            :class:`.Suspects`. If fewer than m are left, the minibatch is trained whole; with ``keep=1`` all others
            are trained on. Default: ``False``.
        options (Mapping[str, Any], optional): Options of the rule by name. Default: ``None``.

    Attributes:
        rule (Rule): The rule's record, with its options.
        last_selection (Picks, optional): The picks of the last minibatch that was selected from: indices, weights
            and metrics; None if that was trained whole.

    Raises:
        TypeError: If ``rule`` is none; at INIT, if the model's loss cannot give per-sample values.
        ValueError: If a value is out of range, or has no use for a rule that looks at nothing; at INIT, if
            ``output_layer`` names no linear layer; at the first batch, if the output layer or the batch's samples
            cannot be found, if rows are not samples, if losses depend on other samples or do not make the model's own
            loss, or if weights cannot reach their samples.

    Example:
        .. code-block:: python

            def largest_gradients(candidates, m):
                norms = candidates.gram.diagonal()
                return norms.topk(m).indices, None

            trainer = Trainer(
                ...,
                algorithms=[RuleBackprop(largest_gradients, start=0.0, end=1.0, keep=0.3, interrupt=0)],
                algorithm_passes=[select_first],
            )
    """

    def __init__(
        self,
        rule: RuleFunction | Rule | str,
        start: float = 0.5,
        end: float = 0.9,
        keep: float = 0.5,
        scale_factor: float = 1.0,
        interrupt: int = 2,
        input_key: Any = 0,
        target_key: Any = 1,
        *,
        output_layer: str | nn.Module | None = None,
        loss_fn: LossFn | None = None,
        selection_microbatch_size: int | str | None = None,
        selection_precision: str | Precision | None = None,
        reuse_activations: bool = False,
        clock: Clock = "duration",
        refresh: str | None = None,
        sample_id_key: Any = None,
        store_device: Literal["cpu", "gpu"] = "cpu",
        store_limit: float = 2.0,
        suspects: bool | Mapping[str, Any] = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        record = rule_named(rule) if isinstance(rule, str) else rule if isinstance(rule, Rule) else Rule(rule)
        super().__init__(start, end, keep, interrupt, input_key, target_key, clock, record.name)
        self.rule = record.with_options(options or {})
        selection_pass = SelectionPass(
            self._reader,
            self._warn_once,
            self._owner,
            loss_fn,
            scale_factor,
            selection_microbatch_size,
            selection_precision,
        )
        if not isinstance(reuse_activations, bool):
            raise TypeError(f"reuse_activations must be True or False, got {reuse_activations!r}.")
        own_pass = scale_factor != 1 or selection_microbatch_size is not None or selection_precision is not None
        if reuse_activations and own_pass:
            raise ValueError(
                "reuse_activations=True makes the selection pass the training step's own forward pass, over the whole "
                "minibatch: leave scale_factor, selection_microbatch_size and selection_precision at their defaults."
            )
        judged = Suspects.of(suspects)
        _check_store(record, refresh, sample_id_key, store_device, store_limit, judged, reuse_activations)
        looks = record.needs != "nothing" or judged is not None
        if not looks and (own_pass or reuse_activations or output_layer is not None):
            raise ValueError(
                f"The rule {record.name!r} looks at nothing, so that there is no selection pass: leave scale_factor, "
                "selection_microbatch_size, selection_precision, reuse_activations and output_layer at their defaults."
            )
        if record.needs == "losses" and judged is None and output_layer is not None:
            raise ValueError(f"The rule {record.name!r} looks at losses only: leave output_layer at its default.")
        self.scale_factor, self.loss_fn, self.output_layer = scale_factor, loss_fn, output_layer
        self.selection_microbatch_size = selection_microbatch_size
        self.selection_precision = selection_pass.precision_name
        self.reuse_activations = reuse_activations
        self.refresh, self.sample_id_key, self.suspects = refresh, sample_id_key, judged
        at_layer = record.needs == "gradients" or judged is not None
        layer = WatchedLayer(selection_pass, output_layer) if at_layer else None
        source, passes = Source(self._reader), self.rule.passes(reuse_activations)
        if looks:
            source = two_passes = TwoPasses(selection_pass, layer)
            if reuse_activations:
                source = OnePass(two_passes, self._warn_once)
            elif refresh is not None:
                numbering, passes = Numbering(sample_id_key), 0
                source = StoredLooks(two_passes, numbering, refresh, store_limit * 2**30, store_device, judged)
        self.selector = Selector(self.rule, source, selection_pass, layer, passes)


def _check_store(
    rule: Rule,
    refresh: str | None,
    sample_id_key: Any,
    store_device: str,
    store_limit: float,
    suspects: Suspects | None,
    reuse_activations: bool,
) -> None:
    """Raises unless what is asked of a store can be had.

    Raises:
        ValueError: If something needs a refresh or has no use with it, or is out of range.
    """
    if store_device not in ("cpu", "gpu"):
        raise ValueError(f"store_device must be 'cpu' or 'gpu' (the run's device), got {store_device!r}.")
    if not store_limit > 0:
        raise ValueError(f"store_limit must be a positive number of GiB, got {store_limit!r}.")
    if refresh is None:
        if suspects is not None or sample_id_key is not None:
            raise ValueError(
                "suspects and sample_id_key are of a store of looks: give refresh, too, for instance refresh='5ep'."
            )
        return
    check_refresh(refresh)
    if reuse_activations:
        raise ValueError(
            "reuse_activations=True looks at the whole minibatch in each step, so that refresh would save nothing: "
            "leave one of them out."
        )
    if rule.needs == "nothing" and suspects is None:
        raise ValueError(f"The rule {rule.name!r} looks at nothing, so refresh is of use to it with suspects only.")
