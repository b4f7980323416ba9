"""The record of a rule: the function, and what others must know of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from composer_gradmatch.rules.candidates import Candidates
from composer_gradmatch.rules.cost import Passes

__all__ = ["Needs", "Rule", "RuleFunction"]

#: What a rule looks at: nothing, which costs no pass; losses; or last-layer gradients and losses.
Needs = Literal["nothing", "losses", "gradients"]
#: ``rule(candidates, m)`` returns :class:`.Picks`, :class:`.WholeBatch` or a pair (indices, weights).
RuleFunction = Callable[[Candidates, int], Any]


@dataclass(frozen=True)
class Rule:
    """A rule and what is known of it before it has run.

    Options of a rule are its keyword-only parameters, which have defaults::

        def largest_losses(candidates, m, *, smallest=False):
            return candidates.losses.topk(m, largest=not smallest).indices, None

        Rule(largest_losses, needs="losses", weighs=False)

    A rule may be a class, whose ``__init__`` takes the options, and whose objects have ``__call__(candidates, m)``. One
    that remembers something from step to step also has ``reset()``, ``state_dict()`` and ``load_state_dict(state)``: it
    is reset in each new Trainer, and its state goes into checkpoints, that of each rank.

    Attributes:
        function (Callable): ``function(candidates, m)``: see :class:`.Candidates`; m is the number of samples to
            pick, at most M.
        name (str, optional): Its name in YAML, in the studies, and of its metrics; empty for that of the function.
            Default: ``""``.
        needs (str, optional): ``"gradients"`` (which come with the losses), ``"losses"`` or ``"nothing"``.
            Default: ``"gradients"``.
        weighs (bool, optional): Whether it gives weights; if it does, the first batch shows that they reach the loss
            as they should. Default: ``True``.
        takes_not_finite (bool, optional): Whether it sees itself to minibatches with losses or gradients that are not
            finite. Others are not shown them, and such minibatches are trained whole. Default: ``False``.
        unbiased (bool, optional): Of a rule that looks at nothing, and so cannot measure its steps: whether the picks'
            weighted mean gradient is the minibatch's in expectation, so that the step length is 1 in expectation.
            Default: ``False``.
        varies (bool, optional): Whether the number of picks follows from what it sees, so that ``keep`` is but an upper
            bound of their share: with ``keep=1`` there is none, and it selects all the same. Default: ``False``.
        color (str, optional): Its colour in the studies' figures, as matplotlib names it; None for the next free one.
            Default: ``None``.
        marker (str, optional): Its marker there; None for the next free one. Default: ``None``.

    Raises:
        TypeError: If the function cannot be called with candidates and m, or an option has no default.
        ValueError: If ``needs`` is something else.
    """

    function: RuleFunction | type
    name: str = ""
    needs: Needs = "gradients"
    weighs: bool = True
    takes_not_finite: bool = False
    unbiased: bool = False
    varies: bool = False
    color: str | None = None
    marker: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"A rule must be a function of (candidates, m), got {type(self.function).__name__}.")
        if self.needs not in ("nothing", "losses", "gradients"):
            raise ValueError(f"needs must be 'nothing', 'losses' or 'gradients', got {self.needs!r}.")
        if not self.name:
            object.__setattr__(self, "name", _name_of(self.function))
        call = self.function.__call__ if inspect.isclass(self.function) else self.function
        arguments = (None,) * (3 if inspect.isclass(self.function) else 2)
        try:
            inspect.signature(call).bind(*arguments)
            self.with_options({})
        except TypeError as error:
            raise TypeError(
                f"A rule is called as rule(candidates, m), with options that are keyword-only and have defaults; "
                f"{self.name!r} takes {inspect.signature(self.function)}: {error}."
            ) from error

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Its options by name."""
        parameters = inspect.signature(self.function).parameters.values()
        return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}

    def passes(self, reuse_activations: bool = False) -> Passes:
        """Tells how many forward passes over the whole minibatch a step makes: see :data:`.Passes`.

        Args:
            reuse_activations (bool, optional): Whether the training step makes use of that of the selection.
                Default: ``False``.
        """
        if self.needs == "nothing":
            return 0
        return 1 if reuse_activations else 2

    def with_options(self, options: Mapping[str, Any]) -> Rule:
        """Gives a rule its options; of a class, makes an object.

        Args:
            options (Mapping[str, Any]): By name.

        Raises:
            TypeError: If it has no such option.
        """
        if unknown := sorted(options.keys() - self.options.keys()):
            known = ", ".join(self.options) or "none"
            raise TypeError(f"The rule {self.name!r} has no option {unknown[0]!r}; it has: {known}.")
        if inspect.isclass(self.function):
            return replace(self, function=self.function(**options))
        return replace(self, function=partial(self.function, **options)) if options else self


def _name_of(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
