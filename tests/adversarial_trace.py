"""Rows in which a forward pass or a loss leaves a trace, or a model changes between steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from adversarial import CLASSES, WIDTH, Fields, M, Row, Tiny, classified, cross_entropy, in_parts
from adversarial_objective import ALL_FORMS, Tags, counted, summed_over_positions, tagged
from cases import On
from composer.core import Event
from torch import nn

CONTAINERS = ("list", "dict", "tuple")


class Normalising(Tiny):
    """Normalises its inputs in place."""

    def forward(self, batch):
        return self.head(self.hidden(self.form.get(batch, "x").sub_(10.0).div_(2.0)))


def far_off(num):
    return [{**fields, "x": fields["x"] * 2 + 10} for fields in classified(num)]


class Replacing(Tiny):
    """Puts its normalised inputs back into the very batch."""

    def forward(self, batch):
        x = (self.form.get(batch, "x") - 10.0) / 2.0
        self.form.put(batch, "x", x)
        return self.head(self.hidden(x))


class Clamping(Tags):
    """Clamps the labels of the positions that do not count, in place, once it knows which they are."""

    def loss(self, outputs, batch, reduction="mean"):
        y = self.form.get(batch, "y")
        ignored = y.eq(-100)
        # A copy for autograd, which must not see the labels change once more.
        losses = -outputs.log_softmax(-1).gather(-1, y.clamp_(min=0).clone()[..., None])[..., 0]
        losses = losses.masked_fill(ignored, 0.0)
        return losses if reduction == "none" else losses.sum() / (~ignored).sum()


class Shifting(Tiny):
    """Counts classes from one, and corrects them in place in the loss, once for each batch that it sees."""

    def forward(self, batch):
        self.corrected = False
        return super().forward(batch)

    def loss(self, outputs, batch, reduction="mean"):
        y = self.form.get(batch, "y")
        if not self.corrected:
            y.sub_(1)
            self.corrected = True
        return F.cross_entropy(outputs, y.clone(), reduction=reduction)


class Popping(Tiny):
    """Pops the labels from the batch in forward and returns them with the logits."""

    def forward(self, batch):
        labels = batch.pop("y")
        return {"logits": super().forward(batch), "labels": labels}

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs["logits"], outputs["labels"], reduction=reduction)


class Momentum(Tiny):
    """A second body that follows the first one, and adds to it."""

    def __init__(self, form):
        super().__init__(form)
        self.key = nn.Linear(WIDTH, 8).requires_grad_(False)

    def follow(self):
        with torch.no_grad():
            self.key.weight.mul_(0.9).add_(self.body.weight, alpha=0.1)

    def forward(self, batch):
        if self.training:
            self.follow()
        x = self.form.get(batch, "x")
        return self.head(self.hidden(x) + torch.tanh(self.key(x)))


class MomentumByData(Momentum):
    def follow(self):
        self.key.weight.data.mul_(0.9).add_(self.body.weight.data, alpha=0.1)


class MomentumAssigned(Momentum):
    def follow(self):
        self.key.weight.data = self.key.weight.data * 0.9 + self.body.weight.data * 0.1


class MomentumInWholeNewParameters(Momentum):
    def follow(self):
        weight = self.key.weight.detach() * 0.9 + self.body.weight.detach() * 0.1
        self.key.weight = nn.Parameter(weight, requires_grad=False)


class TrainedDecay(Tiny):
    """Shrinks its own trained weight in forward."""

    def forward(self, batch):
        if self.training:
            with torch.no_grad():
                self.body.weight.mul_(0.98)
        return super().forward(batch)


class Bounded(Tiny):
    """Embeddings that are scaled down to a norm where they are looked up."""

    def __init__(self, form):
        super().__init__(form)
        self.embedding = nn.Embedding(30, 8, max_norm=0.7)

    def forward(self, batch):
        return self.head(torch.tanh(self.embedding(self.form.get(batch, "x")).mean(1)))


def tokens(num):
    batches = []
    for seed, fields in enumerate(classified(num)):
        generator = torch.Generator().manual_seed(100 + seed)
        batches.append({"x": torch.randint(30, (M, 4), generator=generator), "y": fields["y"]})
    return batches


class Codebook(Tiny):
    """A moving average of what its body puts out, which is taken off it; kept in buffers."""

    def __init__(self, form):
        super().__init__(form)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros(()))

    def update(self, hidden):
        self.mean.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
        self.count.add_(1)

    def forward(self, batch):
        hidden, mean = self.hidden(self.form.get(batch, "x")), self.mean.clone()
        if self.training:
            with torch.no_grad():
                self.update(hidden)
        return self.head(hidden - mean)


class CodebookAssigned(Codebook):
    def update(self, hidden):
        self.mean = self.mean * 0.9 + hidden.mean(0) * 0.1
        self.count = self.count + 1


class CodebookAttribute(Tiny):
    """A moving average in a plain attribute, which is in no state dict."""

    def __init__(self, form):
        super().__init__(form)
        self.mean, self.calls = torch.zeros(8), 0

    def forward(self, batch):
        hidden, mean = self.hidden(self.form.get(batch, "x")), self.mean
        if self.training:
            self.mean = mean * 0.9 + hidden.detach().mean(0) * 0.1
            self.calls += 1
        return self.head(hidden - mean)


class Annealed(Tiny):
    """A temperature that falls with each call of forward."""

    def __init__(self, form):
        super().__init__(form)
        self.calls = 0

    def forward(self, batch):
        logits = super().forward(batch)
        if self.training:
            self.calls += 1
        return logits / (1.0 + 0.5 * self.calls)


class Switched(Tiny):
    """A scale that its user sets between steps."""

    scale = 1.0

    def forward(self, batch):
        return self.head(torch.tanh(self.body(self.form.get(batch, "x")) * self.scale))


def rescale(model, step):
    model.scale = 1.0 + 0.5 * step


def unfreeze(model, step):
    model.body.requires_grad_(step >= 2)


class Shared:
    """Where a class holds its scale."""

    scale = 1.0


class SwitchedElsewhere(Tiny):
    def forward(self, batch):
        return self.head(torch.tanh(self.body(self.form.get(batch, "x")) * Shared.scale))


def rescale_elsewhere(model, step):
    Shared.scale = 1.0 + 0.5 * step


def shrink_by_data(model, step):
    model.body.weight.data = model.body.weight.data * 0.8


class Activated(Tiny):
    def __init__(self, form):
        super().__init__(form)
        self.activation = nn.Tanh()

    def hidden(self, x):
        return self.activation(self.body(x))


def activate(model, step):
    if step == 2:
        model.activation = nn.ELU()


def halves_item(form):
    """Replaces the inputs in the container that holds the picks."""

    def change(state):
        state.batch = form.put(state.batch, "x", form.get(state.batch, "x") * 0.5)

    return On(Event.AFTER_DATALOADER, change)


def half(fields: Fields) -> Fields:
    return {**fields, "x": fields["x"] * 0.5}


def cuts_out(form):
    """Puts zeros in a part of the inputs, in place."""

    def change(state):
        form.get(state.batch, "x")[:, 2:4] = 0.0

    return On(Event.AFTER_DATALOADER, change)


def cut(fields: Fields) -> Fields:
    return {**fields, "x": fields["x"].index_fill(1, torch.tensor([2, 3]), 0.0)}


def relabels_item(form):
    """Replaces the targets in the container that holds the picks."""

    def change(state):
        state.batch = form.put(state.batch, "y", (form.get(state.batch, "y") + 1) % CLASSES)

    return On(Event.AFTER_DATALOADER, change)


def relabel(fields: Fields) -> Fields:
    return {**fields, "y": (fields["y"] + 1) % CLASSES}


def from_logits(model, outputs, fields):
    return cross_entropy(model, outputs["logits"], fields)


def counted_from_one(num):
    return [{**fields, "y": fields["y"] + 1} for fields in classified(num)]


TRACE_ROWS = [
    Row("inputs normalised in place", Normalising, far_off, cross_entropy, forms=ALL_FORMS),
    Row("inputs normalised in place, in microbatches", Normalising, far_off, cross_entropy, microbatch=4),
    Row("copies normalised in place", Normalising, far_off, cross_entropy, microbatch=4, split=in_parts),
    Row("inputs replaced", Replacing, far_off, cross_entropy, forms=("dict",)),
    Row(
        "labels clamped in place",
        Clamping,
        tagged,
        summed_over_positions,
        divisor=counted,
        forms=ALL_FORMS,
    ),
    Row("labels clamped in place, in microbatches", Clamping, tagged, summed_over_positions, counted, microbatch=3),
    Row(
        "labels corrected in place",
        Shifting,
        counted_from_one,
        lambda model, outputs, fields: cross_entropy(model, outputs, {"y": fields["y"] - 1}),
        forms=("tuple", "dict"),
    ),
    Row("labels popped", Popping, classified, from_logits, forms=("dict",)),
    Row("labels popped, in microbatches", Popping, classified, from_logits, forms=("dict",), microbatch=4),
    *(
        Row(f"item replaced after selection{where}", Tiny, classified, cross_entropy, **more, other=other, after=after)
        for other, after in ((halves_item, half),)
        for where, more in (("", {"forms": CONTAINERS}), (", in microbatches", {"forms": ("list",), "microbatch": 4}))
    ),
    Row("targets replaced", Tiny, classified, cross_entropy, forms=CONTAINERS, other=relabels_item, after=relabel),
    Row("cut out in place", Tiny, classified, cross_entropy, forms=CONTAINERS, other=cuts_out, after=cut),
    *(
        Row(f"follows: {model.__name__}", model, classified, cross_entropy, steps=3)
        for model in (Momentum, MomentumByData, MomentumAssigned, MomentumInWholeNewParameters, TrainedDecay)
    ),
    Row(
        "follows, in microbatches", Momentum, classified, cross_entropy, microbatch=3, state_follows_batch=True, steps=3
    ),
    Row("bounded embeddings", Bounded, tokens, cross_entropy, state_follows_batch=True),
    *(
        Row(f"averages: {model.__name__}", model, classified, cross_entropy, state_follows_batch=True)
        for model in (Codebook, CodebookAssigned, CodebookAttribute)
    ),
    Row("annealed by calls", Annealed, classified, cross_entropy, options={"layer": {"output_layer": "head"}}),
    Row("rescaled between steps", Switched, classified, cross_entropy, before_step=rescale),
    Row("rescaled elsewhere", SwitchedElsewhere, classified, cross_entropy, before_step=rescale_elsewhere),
    Row("unfrozen between steps", Tiny, classified, cross_entropy, before_step=unfreeze),
    Row("shrunk between steps", Tiny, classified, cross_entropy, before_step=shrink_by_data),
    Row("activation replaced", Activated, classified, cross_entropy, before_step=activate),
]
