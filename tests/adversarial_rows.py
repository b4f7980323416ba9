"""Rows whose batches, or whose output layer's rows, are not plainly one row for each sample."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from adversarial import (
    TRAINS,
    WIDTH,
    Fields,
    M,
    On,
    Row,
    Tiny,
    changes_fields,
    classified,
    cross_entropy,
    in_parts,
    number_of,
    refused,
    rows_of,
    trains_or_refused,
)
from adversarial_objective import ALL_FORMS, Tags, counted, summed_over_positions, tagged
from composer.core import Event
from torch import nn

NAMES_THE_BATCH = "batch"
NOT_THE_SAMPLES = "sample|position|order"
HEAD = {"layer": {"output_layer": "head"}}


class Regression(Tiny):
    """A squared error, with targets that are a list of M things of any kind."""

    def __init__(self, form):
        super().__init__(form, num_outputs=1)

    def loss(self, outputs, batch, reduction="mean"):
        losses = squared_error(self, outputs, {"targets": self.form.get(batch, "targets")})
        return losses if reduction == "none" else losses.mean()


def squared_error(model, outputs, fields):
    means = [_number(target) for target in fields["targets"]]
    return torch.stack([(output - mean) ** 2 for output, mean in zip(outputs[:, 0], means, strict=False)])


def _number(target):
    if isinstance(target, dict):
        target = target["boxes"]
    return torch.as_tensor(target).mean()


def listed(make):
    """Minibatches whose targets are a list of what ``make`` makes of tensors of different lengths."""

    def batches(num: int) -> list[Fields]:
        made = []
        for fields in classified(num):
            lengths = (2 + torch.arange(M) % 4).tolist()
            tensors = [torch.full((n,), 0.3 * i - 1.0) for i, n in enumerate(lengths)]
            made.append({"x": fields["x"], "id": torch.arange(M), "targets": [make(t) for t in tensors]})
        return made

    return batches


KINDS = {
    "tensors": lambda t: t,
    "0-d tensors": lambda t: t.mean(),
    "arrays": lambda t: t.numpy(),
    "dicts": lambda t: {"boxes": t, "label": "dog"},
    "lists": lambda t: t.tolist(),
}


def with_token_counts(num):
    """Positions that count, and a list of their numbers, as LLM Foundry's collator adds it."""
    return [{**fields, "tokens": list((fields["y"] != -100).sum(1))} for fields in tagged(num)]


class PerToken(Tags):
    """Averages each sample over its tokens, whose numbers are in a list."""

    def loss(self, outputs, batch, reduction="mean"):
        summed = super().loss(outputs, batch, "none").sum(1)
        losses = summed / torch.stack(list(self.form.get(batch, "tokens")))
        return losses if reduction == "none" else losses.mean()


class Autoencoder(Tiny):
    def __init__(self, form):
        super().__init__(form, num_outputs=WIDTH)

    def loss(self, outputs, batch, reduction="mean"):
        losses = ((outputs - self.form.get(batch, "x")) ** 2).mean(1)
        return losses if reduction == "none" else losses.mean()


class GivenWeights(Tiny):
    """Class weights that come with the batch, as many as there are picks."""

    def __init__(self, form):
        super().__init__(form, num_outputs=8)

    def loss(self, outputs, batch, reduction="mean"):
        weight, y = self.form.get(batch, "class_weights"), self.form.get(batch, "y")
        return F.cross_entropy(outputs, y, weight=weight, reduction=reduction)


class Prices(Tiny):
    """A table of prices of classes that comes with the batch, as long as it."""

    def loss(self, outputs, batch, reduction="mean"):
        y = self.form.get(batch, "y")
        losses = self.form.get(batch, "prices")[y] * F.cross_entropy(outputs, y, reduction="none")
        return losses if reduction == "none" else losses.mean()


class Imputing(Tiny):
    def forward(self, batch):
        return self.head(self.hidden(self.form.get(batch, "x").nan_to_num(0.5)))


def with_gaps(num):
    return [{**f, "x": f["x"].masked_fill(f["x"] > 1.0, float("nan"))} for f in classified(num)]


class PositionsFirst(Tags):
    """A recurrent network that has positions first, its output layer, too."""

    def __init__(self, form):
        super().__init__(form)
        self.body = nn.RNN(WIDTH, 8)

    def forward(self, batch):
        return self.head(self.body(self.form.get(batch, "x").transpose(0, 1))[0]).transpose(0, 1)


class PooledAfterHead(PositionsFirst):
    def forward(self, batch):
        return super().forward(batch).mean(1)

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, self.form.get(batch, "y"), reduction=reduction)


def sequences(num, positions):
    return [{**f, "y": torch.arange(M) % 3} for f in tagged(num, positions)]


class SortsInside(Tiny):
    """Works on its samples in another order, and puts them back after the output layer."""

    def forward(self, batch):
        x = self.form.get(batch, "x")
        order = x[:, 0].argsort()
        return self.head(self.hidden(x[order]))[order.argsort()]


class SortedOutputs(Tiny):
    """Returns its samples in another order, to which the loss puts the targets."""

    def forward(self, batch):
        x = self.form.get(batch, "x")
        self.order = x[:, 0].argsort()
        return self.head(self.hidden(x[self.order]))

    def loss(self, outputs, batch, reduction="mean"):
        losses = F.cross_entropy(outputs, self.form.get(batch, "y")[self.order], reduction="none")
        return losses[self.order.argsort()] if reduction == "none" else losses.mean()


class TwoViews(Tiny):
    """Runs the output layer on two views of each sample, whose outputs are averaged."""

    def forward(self, batch):
        x = self.form.get(batch, "x")
        return self.head(self.hidden(torch.cat([x, x.flip(1)]))).unflatten(0, (2, -1)).mean(0)


def sort(fields: Fields) -> Fields:
    return rows_of(fields, fields["x"][:, 0].argsort())


def reverse(fields: Fields) -> Fields:
    return rows_of(fields, torch.arange(number_of(fields) - 1, -1, -1))


def mirror(fields: Fields) -> Fields:
    return {**fields, "x": fields["x"].flip(1)}


def sort_and_mirror(fields: Fields) -> Fields:
    return mirror(sort(fields))


def mirrors_in_place(form):
    def change(state):
        x = form.get(state.batch, "x")
        x.copy_(x.flip(1))

    return On(Event.AFTER_DATALOADER, change)


def with_listed_targets_sorted(fields: Fields) -> Fields:
    return rows_of(fields, fields["x"][:, 1].argsort())


_EITHER = {"batch": trains_or_refused(NAMES_THE_BATCH)}
_LAYER = {"layer": trains_or_refused(NOT_THE_SAMPLES)}
ROW_ROWS = [
    *(
        Row(
            f"targets are {kind}, {'whole' if size is None else 'in microbatches'}",
            Regression,
            listed(make),
            squared_error,
            forms=("tuple", "dict"),
            keep=0.4,
            microbatch=size,
            steps=3,
        )
        for kind, make in KINDS.items()
        for size in ((None, 3) if kind == "tensors" else (3,))
    ),
    Row(
        "tokens weigh microbatches",
        Tags,
        with_token_counts,
        summed_over_positions,
        divisor=counted,
        mass=lambda fields: float(sum(fields["tokens"])),
        forms=("dict", "tuple"),
        microbatch=2,
    ),
    Row(
        "tokens divide losses",
        PerToken,
        with_token_counts,
        lambda model, outputs, fields: summed_over_positions(model, outputs, fields) / torch.stack(fields["tokens"]),
        forms=("dict", "list"),
        microbatch=4,
    ),
    Row(
        "a bare tensor",
        Autoencoder,
        lambda num: [{"x": fields["x"]} for fields in classified(num)],
        lambda model, outputs, fields: ((outputs - fields["x"]) ** 2).mean(1),
        forms=("bare",),
        expected=_EITHER,
    ),
    Row(
        "an object",
        Tiny,
        classified,
        cross_entropy,
        forms=("object", "dataclass"),
        microbatch=4,
        split=in_parts,
        expected=_EITHER,
    ),
    Row(
        "as many class weights as picks",
        GivenWeights,
        lambda num: classified(num, 20, class_weights=lambda g: torch.rand(8, generator=g) + 0.5),
        lambda model, outputs, fields: fields["class_weights"][fields["y"]] * cross_entropy(model, outputs, fields),
        divisor=lambda fields: fields["class_weights"][fields["y"]].sum(),
        forms=("tuple", "dict"),
        shared=("class_weights",),
        keep=0.4,
        microbatch=3,
        split=partial(in_parts, shared=("class_weights",)),
    ),
    Row(
        "as many prices as samples",
        Prices,
        lambda num: classified(num, prices=lambda g: torch.rand(M, generator=g) + 0.5),
        lambda model, outputs, fields: fields["prices"][fields["y"]] * cross_entropy(model, outputs, fields),
        shared=("prices",),
        microbatch=3,
        split=partial(in_parts, shared=("prices",)),
        expected={"batch": trains_or_refused("prices|samples|length")},
    ),
    Row("gaps", Imputing, with_gaps, lambda *a: cross_entropy(*a), forms=ALL_FORMS, microbatch=3, split=in_parts),
    Row("gaps in views", Imputing, with_gaps, lambda *a: cross_entropy(*a), microbatch=3),
    *(
        Row(
            f"positions first, {positions}",
            PositionsFirst,
            partial(tagged, positions=positions),
            summed_over_positions,
            divisor=counted,
            expected=_LAYER,
        )
        for positions in (5, M)
    ),
    *(
        Row(
            f"positions first and pooled, {positions}",
            PooledAfterHead,
            partial(sequences, positions=positions),
            cross_entropy,
            options=HEAD,
            expected=_LAYER,
        )
        for positions in (5, M)
    ),
    Row("sorts inside", SortsInside, classified, cross_entropy, options=HEAD, expected=_LAYER),
    Row(
        "sorted outputs",
        SortedOutputs,
        classified,
        lambda model, outputs, fields: cross_entropy(model, outputs[fields["x"][:, 0].argsort().argsort()], fields),
        expected={**_LAYER, "weights": refused("depends on the outputs of other samples")},
    ),
    Row("two views", TwoViews, classified, cross_entropy, options=HEAD, expected=_LAYER),
    Row(
        "sorted after selection",
        Tiny,
        classified,
        cross_entropy,
        forms=ALL_FORMS,
        other=changes_fields(sort),
        after=sort,
    ),
    Row(
        "sorted after selection, in microbatches",
        Tiny,
        classified,
        cross_entropy,
        microbatch=4,
        other=changes_fields(sort),
        after=sort,
    ),
    Row(
        "reversed after selection",
        Tiny,
        classified,
        cross_entropy,
        microbatch=4,
        split=in_parts,
        other=changes_fields(reverse),
        after=reverse,
    ),
    Row(
        "mirrored in place after selection",
        Tiny,
        classified,
        cross_entropy,
        forms=ALL_FORMS,
        microbatch=4,
        other=mirrors_in_place,
        after=mirror,
    ),
    Row(
        "sorted and mirrored after selection",
        Tiny,
        classified,
        cross_entropy,
        other=changes_fields(sort_and_mirror),
        after=sort_and_mirror,
        expected={"weights": trains_or_refused("order|sample|another algorithm"), "batch": TRAINS},
    ),
    Row(
        "listed targets sorted after selection",
        Regression,
        listed(KINDS["tensors"]),
        squared_error,
        other=changes_fields(with_listed_targets_sorted),
        after=with_listed_targets_sorted,
    ),
    Row(
        "copied and changed in microbatches",
        Tiny,
        classified,
        cross_entropy,
        microbatch=3,
        split=in_parts,
        transform=lambda fields: {**fields, "x": 1.1 * fields["x"]},
        expected={"weights": trains_or_refused("which of the picked samples"), "batch": TRAINS},
    ),
]
