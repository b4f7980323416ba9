"""Rows with so few picks that a model may not take them, or so few samples that there is nothing to pick."""

from __future__ import annotations

import torch
from adversarial import ALL_RULES, Row, Tiny, classified, cross_entropy, trains_or_refused
from torch import nn

WHOLE = {"may_train_whole": True, "any_picks": ALL_RULES, "mixes_samples": True}


class Normalised(Tiny):
    """BatchNorm raises at one sample in training."""

    def __init__(self, form):
        super().__init__(form)
        self.norm = nn.BatchNorm1d(8)

    def hidden(self, x):
        return torch.tanh(self.norm(self.body(x)))


def with_small_rest(num):
    """The last minibatch of an epoch is small."""
    return [*classified(num - 1), *({k: v[:3] for k, v in fields.items()} for fields in classified(1))]


def alike(num):
    return [{k: v[:1].expand(12, *v.shape[1:]).clone() for k, v in fields.items()} for fields in classified(num)]


def alike_at_last(num):
    return [*classified(num - 1), *alike(1)]


SMALL_ROWS = [
    Row("BatchNorm and a last minibatch of 3", Normalised, with_small_rest, cross_entropy, keep=0.3, **WHOLE),
    Row("a last minibatch of 3", Tiny, with_small_rest, cross_entropy, keep=0.3),
    Row("BatchNorm and samples alike at last", Normalised, alike_at_last, cross_entropy, **WHOLE),
    Row(
        "BatchNorm and matching that stops after one pick",
        Normalised,
        classified,
        cross_entropy,
        options={"layer": {"tolerance": 0.99}},
        **WHOLE,
    ),
    Row(
        "BatchNorm and a rest of one pick",
        Normalised,
        classified,
        cross_entropy,
        keep=0.45,
        microbatch=2,
        expected={"batch": trains_or_refused("BatchNorm|one sample|single sample|microbatch")},
        **WHOLE,
    ),
    Row("samples alike", Tiny, alike, cross_entropy, any_picks=ALL_RULES),
    Row("samples alike, in microbatches", Tiny, alike, cross_entropy, any_picks=ALL_RULES, microbatch=4),
    Row("one sample", Tiny, lambda num: classified(num, 1), cross_entropy, may_train_whole=True, any_picks=ALL_RULES),
    Row("two samples", Tiny, lambda num: classified(num, 2), cross_entropy),
]
