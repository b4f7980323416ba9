"""Rows whose output layer is no ``nn.Linear``: a tied head, a matrix product with a bias, a convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from adversarial import CLASSES, Fields, M, Row, Tiny, classified, cross_entropy
from adversarial_objective import Tags, counted, summed_over_positions, tagged
from head_models import VOCABULARY, Segmentation, Tied
from torch import nn


class TiedTags(Tags):
    """A language model with LLM Foundry's head, masked or not."""

    def __init__(self, form):
        super().__init__(form)
        del self.body, self.head
        self.model = Tied()

    def forward(self, batch):
        return self.model(self.form.get(batch, "x"))

    def head_apart(self):
        return self.model.head_apart()


def texts(num) -> list[Fields]:
    made = []
    for seed, fields in enumerate(tagged(num)):
        generator = torch.Generator().manual_seed(seed)
        tokens, classes = (torch.randint(VOCABULARY, fields["y"].shape, generator=generator) for _ in range(2))
        made.append({"x": tokens, "y": torch.where(fields["y"] == -100, -100, classes)})
    return made


class Multiplied(Tiny):
    """A head that is a parameter, multiplied from the right, and a bias."""

    def __init__(self, form):
        super().__init__(form)
        del self.head
        self.out, self.offset = nn.Parameter(torch.randn(8, CLASSES)), nn.Parameter(torch.randn(CLASSES))

    def forward(self, batch):
        return self.hidden(self.form.get(batch, "x")) @ self.out + self.offset

    def head_apart(self):
        return {"out": self.out, "offset": self.offset}


class Pixels(Tiny):
    """Segmentation: a class for each pixel that counts."""

    def __init__(self, form):
        super().__init__(form)
        del self.body, self.head
        self.model = Segmentation()
        self.head = self.model.head

    def forward(self, batch):
        return self.model(self.form.get(batch, "x"))

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, self.form.get(batch, "y"), reduction=reduction)


def images(num) -> list[Fields]:
    made = []
    for seed in range(num):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(3, (M, 4, 5), generator=generator)
        y[torch.rand(y.shape, generator=generator) < 0.3] = -100
        made.append({"x": torch.randn(M, 2, 4, 5, generator=generator), "y": y})
    return made


def summed_over_pixels(model, outputs, fields):
    rows = {"y": fields["y"].flatten(1)}
    return summed_over_positions(model, outputs.flatten(2).transpose(1, 2), rows)


HEAD_ROWS = [
    Row("a tied head", TiedTags, texts, summed_over_positions, divisor=counted, microbatch=3, steps=3),
    Row("a product and a bias", Multiplied, classified, cross_entropy, forms=("tuple", "dict"), steps=3),
    Row("pixels", Pixels, images, summed_over_pixels, divisor=counted, forms=("tuple", "dict"), microbatch=3, steps=3),
]
