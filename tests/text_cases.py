"""Tiny HuggingFace models with random weights, one a task, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from composer.models import HuggingFaceModel
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.modeling_outputs import TokenClassifierOutput

VOCABULARY, LENGTH = 40, 7


def _bert_config(**changes: Any) -> BertConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 16}
    return BertConfig(**{**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes})


class WeightedTokenClassification(BertForTokenClassification):
    """Has a criterion of its own, with class weights and label smoothing."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        weights = torch.linspace(0.5, 2.0, config.num_labels)
        self.criterion = nn.CrossEntropyLoss(weights, label_smoothing=0.1)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> TokenClassifierOutput:
        outputs = super().forward(input_ids, attention_mask)
        if labels is not None:
            outputs["loss"] = self.criterion(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


def _gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    # The beginning and the end of texts, which it has at 50256.
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


def _classes(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, (n,), generator=generator)


def _tokens(classes: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        labels = torch.randint(classes, (n, LENGTH), generator=generator)
        labels[torch.rand(n, LENGTH, generator=generator) < 0.4] = -100
        labels[:, -1] = 1  # No sample is masked wholly.
        return labels

    return draw


@dataclass(frozen=True)
class TextCase:
    name: str
    module: Callable[[], nn.Module]
    labels: Callable[[int, torch.Generator], torch.Tensor]
    layer: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def model(self, seed: int = 0) -> HuggingFaceModel:
        torch.manual_seed(seed)
        return HuggingFaceModel(self.module(), **self.arguments)

    def batch(self, num_samples: int, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, VOCABULARY, (num_samples, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        mask[::3, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels(num_samples, generator)}

    def data(self, num_samples: int, seed: int = 0) -> Dataset:
        return Samples(self.batch(num_samples, seed))


class Samples(Dataset):
    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


CLASSIFICATION = TextCase(
    "classification", lambda: BertForSequenceClassification(_bert_config(num_labels=3)), _classes, "model.classifier"
)
REGRESSION = TextCase(
    "regression",
    lambda: BertForSequenceClassification(_bert_config(num_labels=1)),
    lambda n, generator: torch.randn(n, generator=generator),
    "model.classifier",
)
MULTI_LABEL = TextCase(
    "multi_label",
    lambda: BertForSequenceClassification(_bert_config(num_labels=3)),
    lambda n, generator: torch.randint(2, (n, 3), generator=generator).float(),
    "model.classifier",
)
TOKENS = TextCase(
    "tokens", lambda: BertForTokenClassification(_bert_config(num_labels=3)), _tokens(3), "model.classifier"
)
WEIGHTED_TOKENS = TextCase(
    "weighted_tokens", lambda: WeightedTokenClassification(_bert_config(num_labels=3)), _tokens(3), "model.classifier"
)
MASKED_LM = TextCase(
    "masked_lm", lambda: BertForMaskedLM(_bert_config()), _tokens(VOCABULARY), "model.cls.predictions.decoder"
)
CAUSAL_LM = TextCase("causal_lm", _gpt2, _tokens(VOCABULARY), "model.lm_head")
TUPLES = TextCase(
    "tuples",
    lambda: BertForSequenceClassification(_bert_config(num_labels=3, return_dict=False)),
    _classes,
    "model.classifier",
)
TEXT_CASES = [CLASSIFICATION, REGRESSION, MULTI_LABEL, TOKENS, WEIGHTED_TOKENS, MASKED_LM, CAUSAL_LM, TUPLES]
