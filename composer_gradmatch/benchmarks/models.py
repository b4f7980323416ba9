"""The models whose memory is measured, and batches of random data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from composer.models import ComposerModel, HuggingFaceModel
from torch import nn

from composer_gradmatch.train.builders import build_named

__all__ = ["MODELS", "BenchmarkModel", "CausalLM", "minilm"]


class CausalLM(ComposerModel):
    """A small causal transformer with a large vocabulary.

    Args:
        vocabulary (int, optional): C. Default: ``32000``.
        width (int, optional): D. Default: ``128``.
        layers (int, optional): Blocks. Default: ``2``.
    """

    def __init__(self, vocabulary: int = 32000, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, batch: Any) -> torch.Tensor:
        """Logits, shape (M, T, C)."""
        mask = nn.Transformer.generate_square_subsequent_mask(batch[0].shape[1], device=batch[0].device)
        return self.head(self.body(self.embedding(batch[0]), mask=mask, is_causal=True))

    def loss(self, outputs: torch.Tensor, batch: Any, reduction: str = "mean") -> torch.Tensor:
        """Computes the cross-entropy of the next tokens; without a reduction of shape (M, T)."""
        losses = F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), reduction=reduction)
        return losses.reshape(batch[1].shape) if reduction == "none" else losses


def minilm() -> HuggingFaceModel:
    """Builds a BERT of MiniLM's size with random weights, as a classifier of texts in two classes.

    Raises:
        ImportError: If transformers is not installed.
    """
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError as error:
        raise ImportError("The model minilm needs transformers: pip install 'composer-gradmatch[nlp]'.") from error
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        num_labels=2,
    )
    return HuggingFaceModel(BertForSequenceClassification(config), use_logits=True)


@dataclass(frozen=True)
class BenchmarkModel:
    """A model, its data, and the sizes that it is measured at by default.

    Attributes:
        build (Callable): Makes the model.
        batch (Callable): Makes a batch of M samples.
        samples (tuple[int, ...]): The minibatch sizes M.
        picks (int): m, also the size of a training microbatch.
    """

    build: Callable[[], ComposerModel]
    batch: Callable[[int], Any]
    samples: tuple[int, ...]
    picks: int


def _images(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num_samples, 3, 32, 32), torch.randint(10, (num_samples,))


def _texts(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(32000, (num_samples, 65))
    return tokens[:, :-1], tokens[:, 1:]


def _classified_texts(num_samples: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(30522, (num_samples, 64)),
        "attention_mask": torch.ones(num_samples, 64, dtype=torch.int64),
        "labels": torch.randint(2, (num_samples,)),
    }


def _resnet18_cifar(norm: str) -> Callable[[], ComposerModel]:
    return lambda: build_named("model", {"name": "resnet18_cifar", "num_classes": 10, "norm": norm})


_IMAGE_SAMPLES, _TEXT_SAMPLES = (32, 64, 128, 256), (16, 32, 64)
MODELS = {
    "resnet18_cifar": BenchmarkModel(_resnet18_cifar("batch"), _images, _IMAGE_SAMPLES, 16),
    "resnet18_cifar_group": BenchmarkModel(_resnet18_cifar("group"), _images, _IMAGE_SAMPLES, 16),
    "causal_lm": BenchmarkModel(CausalLM, _texts, _TEXT_SAMPLES, 8),
    "minilm": BenchmarkModel(minilm, _classified_texts, _TEXT_SAMPLES, 8),
}
