"""What a step of LLM Foundry must come to, in float64, by loops over samples: shares no code with the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oracles import brute_force_omp, clip_and_normalize, per_sample_gradients

Record = dict[str, Any]


def model_of(record: Record) -> torch.nn.Module:
    """The model as the step began, in float64."""
    if "model" not in record:
        model = record["kind"](record["config"])
        model.load_state_dict(record["weights"])
        record["model"] = model.double().train()
    return record["model"]


def sample(record: Record, i: int) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask", "sequence_id", "labels")
    return {name: record["minibatch"][name][i : i + 1] for name in names if name in record["minibatch"]}


def num_samples(record: Record) -> int:
    return len(record["minibatch"]["input_ids"])


def logits_and_hidden(model: torch.nn.Module, row: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model returns of a sample, and what its head is applied to."""
    inputs = {name: value for name, value in row.items() if name != "labels"}
    body = getattr(model, "transformer", None)
    if body is None:
        body = model.model
        inputs.pop("sequence_id", None)  # Which HuggingFace's models do not know.
    hidden = body(**inputs).last_hidden_state
    return model(**inputs).logits, hidden


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The losses of the tokens to learn from: each predicted from those before it."""
    (logits,), (labels,) = logits, labels
    losses = [F.cross_entropy(logits[t], labels[t + 1]) for t in range(len(labels) - 1) if labels[t + 1] != -100]
    return torch.stack(losses)


def num_tokens(record: Record, i: int) -> int:
    return int((record["minibatch"]["labels"][i, 1:] != -100).sum())


def sample_losses(record: Record) -> list[float]:
    """The sum of each sample's token losses."""
    model = model_of(record)
    with torch.no_grad():
        rows = [sample(record, i) for i in range(num_samples(record))]
        return [float(token_losses(logits_and_hidden(model, row)[0], row["labels"]).sum()) for row in rows]


def step_gradients(records: list[Record]) -> dict[str, torch.Tensor]:
    """The gradients of Σwᵢℓᵢ over the picks of all ranks, divided by the number of their tokens.

    Args:
        records: The same step, as each rank has seen it.
    """
    model = model_of(records[0])
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    tokens = 0
    for record in records:
        weights = record["sample_weights"]
        weights = torch.ones(len(record["indices"])) if weights is None else weights
        for i, weight in zip(record["indices"].tolist(), weights.double().tolist(), strict=True):
            row = sample(record, i)
            loss = weight * token_losses(logits_and_hidden(model, row)[0], row["labels"]).sum()
            for name, grad in zip(
                parameters, torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True), strict=True
            ):
                total[name] += grad
            tokens += num_tokens(record, i)
    return {name: value / tokens for name, value in total.items()}


def head_gradients(record: Record) -> np.ndarray:
    """Each sample's gradient of the head's weight, of a tied one the head's part of it, shape (M, C·D)."""
    model = model_of(record)
    head = getattr(model, "lm_head", None)
    shared = model.get_input_embeddings().weight if head is None else head.weight
    weight = torch.nn.Parameter(shared.detach().clone())
    losses = []
    for i in range(num_samples(record)):
        row = sample(record, i)
        logits, hidden = logits_and_hidden(model, row)
        own = F.linear(hidden.detach(), weight)
        torch.testing.assert_close(own, logits)
        losses.append(token_losses(own, row["labels"]).sum())
    return per_sample_gradients(lambda i: losses[i], [weight], len(losses)).numpy()


def matched(record: Record, keep: float) -> tuple[np.ndarray, np.ndarray, float]:
    """The picks of matching and their weights, and by how much each pick won over the next, at the least."""
    gradients = head_gradients(record)
    picks, weights, margins = brute_force_omp(gradients, gradients.mean(0), max(1, int(keep * len(gradients))))
    return *clip_and_normalize(picks, weights), min(margins)
