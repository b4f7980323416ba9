"""Models whose head is no ``nn.Linear``, each of which can be asked for its head's use of the weight alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, LENGTH = 11, 6, 4


class SharedEmbedding(nn.Embedding):
    """An embedding that is the head, too, as LLM Foundry's."""

    def forward(self, input, unembed=False):
        return F.linear(input, self.weight) if unembed else super().forward(input)


class Causal(nn.Module):
    """A language model in small, of tokens (M, T), whose head is ``use(hidden, self)``.

    Args:
        use (Callable): Computes the logits with ``self.weight``, which is the embedding's, ``self.own`` (D, C),
            ``self.square`` (D, D) or ``self.bias``.
    """

    def __init__(self, use):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.own, self.square = (nn.Parameter(torch.randn(WIDTH, n) / 3) for n in (VOCABULARY, WIDTH))
        self.bias = nn.Parameter(torch.randn(VOCABULARY))
        self.use = use
        self.apart: torch.Tensor | None = None

    @property
    def weight(self):
        return self.embedding.weight if self.apart is None else self.apart

    def forward(self, tokens):
        return self.use(torch.tanh(self.body(self.embedding(tokens))), self)

    def head_apart(self):
        """Lets the head use a copy of the embedding's weight, and gives what it uses."""
        self.apart = self.embedding.weight.detach().clone().requires_grad_()
        return {"weight": self.apart, "own": self.own, "square": self.square, "bias": self.bias}


class Tied(nn.Module):
    """LLM Foundry's MPT in small."""

    def __init__(self):
        super().__init__()
        self.wte, self.body = SharedEmbedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.apart: torch.Tensor | None = None

    def forward(self, tokens):
        hidden = torch.tanh(self.body(self.wte(tokens)))
        return self.wte(hidden, unembed=True) if self.apart is None else F.linear(hidden, self.apart)

    def head_apart(self):
        """Lets the head use a copy of the embedding's weight, and gives it."""
        self.apart = self.wte.weight.detach().clone().requires_grad_()
        return {"weight": self.apart}


class Segmentation(nn.Module):
    """Classes of the pixels of images (M, 2, 4, 5)."""

    def __init__(self, head=None):
        super().__init__()
        self.body, self.head = nn.Conv2d(2, WIDTH, 3, padding=1), head or nn.Conv2d(WIDTH, 3, 1)

    def forward(self, images):
        return self.head(torch.tanh(self.body(images)))


#: How logits come out of a product, and which parameters it is of.
USES = {
    "F.linear": (lambda h, m: F.linear(h, m.weight), ("weight",)),
    "F.linear, by keywords": (lambda h, m: F.linear(h, weight=m.weight, bias=m.bias), ("weight", "bias")),
    "matmul with a transposed weight": (lambda h, m: h @ m.weight.T, ("weight",)),
    "matmul, transposed by t": (lambda h, m: torch.matmul(h, m.weight.t()), ("weight",)),
    "matmul": (lambda h, m: torch.matmul(h, m.own), ("own",)),
    "mm": (lambda h, m: torch.mm(h.mean(1), m.own)[:, None], ("own",)),
    "addmm": (lambda h, m: torch.addmm(m.bias, h.mean(1), m.own)[:, None], ("own", "bias")),
    "einsum": (lambda h, m: torch.einsum("b t d, v d -> b t v", h, m.weight), ("weight",)),
    "a bias added": (lambda h, m: h @ m.own + m.bias, ("own", "bias")),
    "a bias added first": (lambda h, m: m.bias + h @ m.own, ("own", "bias")),
    "scaled and capped": (lambda h, m: 3 * torch.tanh(0.2 * F.linear(h, m.weight)), ("weight",)),
    "square": (lambda h, m: h @ m.square, ("square",)),
    "square, transposed": (lambda h, m: h @ m.square.T, ("square",)),
    "cast": (lambda h, m: F.linear(h.float(), m.weight.float()), ("weight",)),
}
