"""Matching problems: Gram matrices of real and of made-up last-layer gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from composer_gradmatch.data import digits
from composer_gradmatch.last_layer import OutputLayerTap, last_layer_gram, resolve_output_layer
from composer_gradmatch.models import digits_cnn

__all__ = ["PROBLEMS", "gram_matrices"]

#: Name → epochs of training before the minibatches are taken; None for random features and logits.
PROBLEMS: dict[str, int | None] = {"random": None, "digits, untrained": 0, "digits, 3 epochs": 3}
_INPUTS, _CLASSES = 64, 10


def gram_matrices(name: str, num_samples: int, count: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Makes Gram matrices of minibatches, shape (M, M), float64.

    Args:
        name (str): A key of :data:`PROBLEMS`: softmax cross-entropy of random features (D = 64) and logits of ten
            classes, or of the network and the images of ``configs/digits.yaml``, trained by plain SGD on all samples.
        num_samples (int): M.
        count (int): How many.
        seed (int, optional): Of everything that is drawn. Default: ``0``.
    """
    epochs = PROBLEMS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if epochs is None:
            for _ in range(count):
                logits = torch.randn(num_samples, _CLASSES, dtype=torch.float64)
                labels = F.one_hot(torch.randint(_CLASSES, (num_samples,)), _CLASSES)
                inputs = torch.randn(num_samples, _INPUTS, dtype=torch.float64)
                yield last_layer_gram(inputs, logits.softmax(1) - labels)
            return
        yield from _of_digits(num_samples, count, epochs)


def _of_digits(num_samples: int, count: int, epochs: int) -> Iterator[torch.Tensor]:
    model = digits_cnn(_CLASSES)
    images_and_labels = digits("train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(epochs):
        for images, labels in DataLoader(images_and_labels, batch_size=128, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model((images, labels)), labels).backward()
            optimizer.step()
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    layer = resolve_output_layer(model, layers[-1])
    given = 0
    while given < count:
        for images, labels in DataLoader(images_and_labels, batch_size=num_samples, shuffle=True, drop_last=True):
            if given == count:
                return
            with OutputLayerTap(layer).open() as tap:
                losses = F.cross_entropy(model((images, labels)), labels, reduction="none")
                inputs, grads = tap.inputs_and_grads(losses)
            yield last_layer_gram(inputs.double(), grads.double())
            given += 1
