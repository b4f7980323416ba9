"""The table of adversarial models and batches: what a row is, what a strategy is, and the rows of all themes.

A row describes its batches as *fields*, a dictionary of tensors and lists with one row for each sample; a
:class:`Form` packs them into a tuple, a list, a dictionary, an object or a bare tensor for the model. Every strategy
runs every row against a float64 reference (``lockstep.py``); a new strategy is one entry of :data:`STRATEGIES`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from cases import On
from composer.core import Algorithm, Event
from composer.models import ComposerModel
from selecting import factory
from torch import nn

from composer_gradmatch import GradMatch, LossBackprop, RandomBackprop
from composer_gradmatch.algorithms.subset_backprop import SubsetBackprop
from composer_gradmatch.rules.rule import Rule
from composer_gradmatch.rules.table import RULES

Fields = dict[str, Any]


@dataclass
class Pair:
    """A batch that is a dataclass."""

    x: torch.Tensor
    y: torch.Tensor


def _getter_and_setter(name):
    def put(batch, value):
        setattr(batch, name, value)
        return batch

    return (lambda batch: getattr(batch, name)), put


@dataclass(frozen=True)
class Form:
    """How a batch holds its fields."""

    kind: str
    names: tuple[str, ...]

    def pack(self, fields: Fields) -> Any:
        fields = {name: fields[name] for name in self.names}
        if self.kind == "bare":
            return fields["x"]
        kinds = {"tuple": tuple, "list": list}
        if self.kind in kinds:
            return kinds[self.kind](fields.values())
        return {"dict": dict, "object": SimpleNamespace, "dataclass": Pair}[self.kind](**fields)

    def get(self, batch: Any, name: str) -> Any:
        if self.kind == "bare":
            return batch
        if self.kind in ("tuple", "list"):
            return batch[self.names.index(name)]
        return batch[name] if self.kind == "dict" else getattr(batch, name)

    def put(self, batch: Any, name: str, value: Any) -> Any:
        """Replaces an item of the very container; of a tuple's, in a new one."""
        if self.kind == "list":
            batch[self.names.index(name)] = value
        elif self.kind == "dict":
            batch[name] = value
        elif self.kind in ("object", "dataclass"):
            setattr(batch, name, value)
        else:
            return self.pack({**self.unpack(batch), name: value})
        return batch

    def unpack(self, batch: Any) -> Fields:
        return {name: self.get(batch, name) for name in self.names}

    def keys(self) -> dict[str, Any]:
        """The keys that a user gives: none where the defaults serve."""
        if self.kind in ("bare", "tuple", "list"):
            return {}
        named = self.names[:2]
        if self.kind != "dict":
            named = tuple(map(_getter_and_setter, named))
        return dict(zip(("input_key", "target_key"), named, strict=True))


@dataclass(frozen=True)
class Outcome:
    """What must come of a row: training as the reference does, or a refusal before the first step.

    Where both are given, either will do. ``refusal`` and ``warning`` are patterns of what must be said.
    """

    trains: bool = True
    refusal: str | None = None
    warning: str | None = None


TRAINS = Outcome()


def refused(pattern: str) -> Outcome:
    return Outcome(trains=False, refusal=pattern)


def trains_or_refused(pattern: str) -> Outcome:
    return Outcome(refusal=pattern)


def warned_or_refused(pattern: str) -> Outcome:
    return Outcome(refusal=pattern, warning=pattern)


def number_of(fields: Fields) -> int:
    """The number of samples."""
    return len(fields["x"])


@dataclass(frozen=True)
class Row:
    """A model, its batches, and what training on a part of them must come to.

    The objective of a microbatch of n samples with weights w is Σwᵢℓᵢ/divisor + terms.

    Attributes:
        name: Of the row.
        make_model: The model for batches of a form.
        make_batches: The fields of the first minibatches.
        losses: ℓ (n,), of (model, outputs, fields), written without the model's own loss.
        divisor: Z of a microbatch. Default: its number of samples.
        terms: What else is in the model's own loss, of (model, outputs, fields). Default: nothing.
        forms: The kinds of batches to try.
        shared: Fields that belong to the batch as a whole.
        keep: Of the strategies.
        microbatch: ``device_train_microbatch_size``; None for the whole batch.
        split: The fields of microbatches, for a ``DataSpec`` of one's own. Default: Composer's.
        transform: ``microbatch_transforms``, of fields.
        mass: What microbatches are weighted by, e.g. their tokens. Default: the numbers of their samples.
        other: Makes another algorithm, which stands behind the strategy.
        after: What that algorithm makes of the picks' fields, which hold their weights as ``_w``.
        before_step: Changes the model before a step, of (model, step).
        options: More arguments of the strategies with a need, by need.
        expected: By what a strategy needs, the first that it has of layer, weights, losses and batch.
        may_train_whole: Whether a minibatch may be trained whole.
        any_picks: The rules by which more than one set of picks is right.
        state_follows_batch: Whether the model's state depends on which samples it ran on.
        mixes_samples: Whether a sample's output depends on those it runs together with, as BatchNorm's does: the
            gradient of a reused pass is then another one, which tests/reuse is about, and is not compared here.
        steps: The number of them.
    """

    name: str
    make_model: Callable[[Form], ComposerModel]
    make_batches: Callable[[int], list[Fields]]
    losses: Callable[[Any, Any, Fields], torch.Tensor]
    divisor: Callable[[Fields], Any] = number_of
    terms: Callable[[Any, Any, Fields], Any] = lambda model, outputs, fields: 0.0
    forms: tuple[str, ...] = ("tuple",)
    shared: tuple[str, ...] = ()
    keep: float = 0.5
    microbatch: int | None = None
    split: Callable[[Fields, int], list[Fields]] | None = None
    transform: Callable[[Fields], Fields] | None = None
    mass: Callable[[Fields], float] | None = None
    other: Callable[[Form], Algorithm] | None = None
    after: Callable[[Fields], Fields] = lambda fields: fields
    before_step: Callable[[Any, int], None] = lambda model, step: None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    expected: Mapping[str, Outcome] = field(default_factory=dict)
    may_train_whole: bool = False
    any_picks: Set[str] = frozenset()
    state_follows_batch: bool = False
    mixes_samples: bool = False
    steps: int = 5

    def form(self, kind: str) -> Form:
        return Form(kind, tuple(self.make_batches(1)[0]))

    def outcome(self, strategy: Strategy) -> Outcome:
        found = next(
            (self.expected[need] for need in NEEDS if need in strategy.needs and need in self.expected), TRAINS
        )
        if found.refusal is None and "classes" in strategy.needs and not self._has_classes():
            return refused("needs the class of each sample")
        return found

    def _has_classes(self) -> bool:
        fields = self.make_batches(1)[0]
        if len(fields) == 1:
            return False
        targets = fields[[*fields][1]]  # Where every form's target_key is.
        if isinstance(targets, list):
            return all(isinstance(each, int) or (each.dtype == torch.int64 and not each.dim()) for each in targets)
        return targets.dtype == torch.int64 and targets.shape == (number_of(fields),)


#: What a strategy can need of a model and its batches, the most demanding first.
NEEDS = ("layer", "weights", "losses", "batch")
#: How a strategy's picks are checked.
ALL_RULES = frozenset({"any", "largest losses", "matching"})


@dataclass(frozen=True)
class Strategy:
    """A way of picking.

    Attributes:
        name: Of the strategy.
        algorithm: Makes it.
        needs: Of :data:`NEEDS`: the samples of a batch, their losses, weighted losses, an output layer; and
            ``"classes"``, if their targets must be that.
        rule: How its picks are checked, of :data:`ALL_RULES`.
        options: Its further arguments.
        slow: Whether another one stands for it, in all but the slow tests.
    """

    name: str
    algorithm: Callable[..., SubsetBackprop]
    needs: frozenset[str]
    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False

    @property
    def reuses(self) -> bool:
        return bool(self.options.get("reuse_activations"))

    def make(self, row: Row, form: Form, start: float = 0.0) -> SubsetBackprop:
        more = {key: value for need in self.needs for key, value in row.options.get(need, {}).items()}
        accepted = inspect.signature(self.algorithm).parameters
        more = {key: value for key, value in more.items() if key in accepted}  # A solver's are not another rule's.
        return self.algorithm(start, 1.0, row.keep, interrupt=0, **form.keys(), **self.options, **more)


_ONE_PASS = {"reuse_activations": True}
_SURE = {"beta": 1e5}  # Draws the largest losses, always.
STRATEGIES = [
    Strategy("random", RandomBackprop, frozenset({"batch"}), "any"),
    Strategy("loss", LossBackprop, frozenset({"batch", "losses"}), "largest losses", _SURE),
    Strategy("gradmatch", GradMatch, frozenset(NEEDS), "matching"),
    Strategy("loss-reuse", LossBackprop, frozenset({"batch", "losses"}), "largest losses", {**_SURE, **_ONE_PASS}),
    Strategy("gradmatch-reuse", GradMatch, frozenset(NEEDS), "matching", _ONE_PASS),
]


def _strategies_of(name: str, rule: Rule) -> Iterator[Strategy]:
    """A rule's own, in two passes and in one: all are checked, whatever they pick."""
    needs = {"batch"}
    if rule.needs != "nothing":
        needs |= {"losses"}
    if rule.needs == "gradients":
        needs |= {"layer"}
    if rule.weighs:
        needs |= {"losses", "weights"}
    if name == "stratified":
        needs |= {"classes"}
    # What it asks of models and batches, another one asks, too, where that needs as much and more.
    slow = any(needs <= other.needs for other in STRATEGIES)
    yield Strategy(name, factory(name), frozenset(needs), "any", slow=slow)
    if rule.needs != "nothing":
        yield Strategy(f"{name}-reuse", factory(name), frozenset(needs), "any", _ONE_PASS, slow)


for name, rule in RULES.items():
    if name not in ("random_backprop", "loss_backprop", "gradmatch"):
        STRATEGIES += list(_strategies_of(name, rule))

M, WIDTH, CLASSES = 12, 6, 3


def classified(num: int, num_samples: int = M, **more: Callable[[torch.Generator], Any]) -> list[Fields]:
    """Minibatches of inputs and classes, and further fields, each made with a generator."""
    batches = []
    for seed in range(num):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_samples, WIDTH, generator=generator)
        y = torch.randint(CLASSES, (num_samples,), generator=generator)
        batches.append({"x": x, "y": y, **{name: make(generator) for name, make in more.items()}})
    return batches


class Tiny(ComposerModel):
    """Two layers and cross-entropy; the base of the rows' models."""

    def __init__(self, form: Form, num_outputs: int = CLASSES):
        super().__init__()
        self.form = form
        self.body, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, num_outputs)

    def hidden(self, x):
        return torch.tanh(self.body(x))

    def forward(self, batch):
        return self.head(self.hidden(self.form.get(batch, "x")))

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, self.form.get(batch, "y"), reduction=reduction)


def cross_entropy(model, outputs, fields: Fields) -> torch.Tensor:
    """Of each sample, from its definition."""
    rows = torch.arange(len(outputs))
    return outputs.exp().sum(1).log() - outputs[rows, fields["y"]]


def changes_fields(function: Callable[[Fields], Fields]) -> Callable[[Form], Algorithm]:
    """An algorithm that changes the minibatch's fields on AFTER_DATALOADER."""

    def make(form: Form) -> Algorithm:
        def change(state):
            state.batch = form.pack(function(form.unpack(state.batch)))

        return On(Event.AFTER_DATALOADER, change)

    return make


def rows_of(fields: Fields, indices: torch.Tensor, shared: tuple[str, ...] = ()) -> Fields:
    """Some samples' fields."""

    def take(value):
        return value[indices] if isinstance(value, torch.Tensor) else [value[i] for i in indices.tolist()]

    return {name: value if name in shared else take(value) for name, value in fields.items()}


def in_parts(fields: Fields, size: int, shared: tuple[str, ...] = ()) -> list[Fields]:
    """Consecutive samples, ``size`` at a time, copied."""
    return [rows_of(fields, part, shared) for part in torch.arange(number_of(fields)).split(size)]


def says(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE | re.DOTALL) is not None
