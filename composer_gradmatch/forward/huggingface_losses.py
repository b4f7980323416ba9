"""Per-sample losses of Composer's ``HuggingFaceModel``, whose own loss is only there reduced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from composer.models import HuggingFaceModel
from torch import nn

__all__ = ["check_labels", "huggingface_losses", "is_huggingface"]

_REMEDY = "Pass loss_fn=..., a function of (outputs, batch) that returns the loss of each sample, shape (M,)."


def is_huggingface(model: Any) -> bool:
    """Tells whether a model is Composer's wrapper of a HuggingFace model."""
    return isinstance(model, HuggingFaceModel)


def check_labels(model: Any, batch: Any) -> None:
    """Checks the labels of a batch before the model sees them, where an error would not name them.

    Args:
        model (HuggingFaceModel): The model.
        batch (Mapping): The batch.

    Raises:
        ValueError: If there are no labels, a class is outside [0, C), or every position is masked.
    """
    labels = _labels(batch)
    if labels.is_floating_point() or not labels.numel():
        return
    ignored = _criterion(model).ignore_index
    counted = labels[labels != ignored]
    if labels.dim() > 1 and not len(counted):
        raise ValueError(
            f"batch['labels'] of shape {tuple(labels.shape)} masks every position with {ignored}: there is no loss "
            "to train on. Check the collate function's masking and the truncation of long samples."
        )
    num_classes = _num_classes(model)
    if num_classes > 1 and len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < num_classes:
        raise ValueError(
            f"batch['labels'] of shape {tuple(labels.shape)} has classes from {int(counted.min())} to "
            f"{int(counted.max())}; expected [0, {num_classes}), or {ignored} for what is not to count. Check the data "
            "set's labels and the model's num_labels or vocabulary."
        )


def huggingface_losses(model: Any, outputs: Any, batch: Any, reduction: str = "none") -> torch.Tensor:
    """Computes the losses of which a HuggingFace model's own loss is the mean over samples, positions or class weights.

    Sequence classification, regression and multi-label classification by the config's ``problem_type`` (by the
    labels' type where it has none, as in transformers); token classification and masked language models;
    causal ones with their shift. Class weights, label smoothing and the ignored class (-100) are those of the
    model's ``nn.CrossEntropyLoss`` or ``nn.BCEWithLogitsLoss`` where it has one, else of its config.

    Args:
        model (HuggingFaceModel): The model.
        outputs (Mapping | tuple): What its ``forward`` returned; its ``logits`` have shape (M, C) or (M, T, C).
        batch (Mapping): The batch, with ``labels``.
        reduction (str, optional): ``"mean"`` for the model's own loss. Default: ``"none"``.

    Returns:
        torch.Tensor: Shape (M,) or (M, T), float32 or better; 0 where nothing counts. A scalar of the mean.

    Raises:
        ValueError: If there are no labels or no logits, or their shapes do not go together.
    """
    labels, logits = _labels(batch), _logits(model, outputs)
    labels = labels.to(logits.device)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if logits.dim() == 3:
        return _position_losses(model, logits, labels, reduction)
    kind = _problem_type(model, logits, labels)
    if labels.numel() != (len(logits) if kind == "single_label_classification" else logits.numel()):
        raise ValueError(_disagreement(logits, labels))
    if kind == "regression":
        return F.mse_loss(logits.flatten(1), labels.reshape(logits.shape).to(logits), reduction=reduction)
    if kind == "multi_label_classification":
        own = next((each for each in model.modules() if isinstance(each, nn.BCEWithLogitsLoss)), nn.BCEWithLogitsLoss())
        return F.binary_cross_entropy_with_logits(
            logits, labels.to(logits), own.weight, pos_weight=own.pos_weight, reduction=reduction
        )
    return _cross_entropy(model, logits, labels.flatten(), reduction)


def _position_losses(model: Any, logits: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    if labels.shape != logits.shape[:2]:
        raise ValueError(_disagreement(logits, labels))
    if model.shift_labels:
        ignored = torch.full_like(labels[:, :1], _criterion(model).ignore_index)
        labels = torch.cat([labels[:, 1:], ignored], dim=1)
    losses = _cross_entropy(model, logits.flatten(0, 1), labels.flatten(), reduction)
    return losses.reshape(labels.shape) if reduction == "none" else losses


def _cross_entropy(model: Any, logits: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    own = _criterion(model)
    return F.cross_entropy(
        logits,
        labels,
        own.weight,
        ignore_index=own.ignore_index,
        reduction=reduction,
        label_smoothing=own.label_smoothing,
    )


def _criterion(model: Any) -> nn.CrossEntropyLoss:
    for module in model.modules():
        if isinstance(module, nn.CrossEntropyLoss):
            return module
    smoothing = getattr(model.config, "label_smoothing", 0.0)
    return nn.CrossEntropyLoss(label_smoothing=smoothing if isinstance(smoothing, float) else 0.0)


def _num_classes(model: Any) -> int:
    """Finds C, of a language model's head or of a classifier; 0 if it cannot be told."""
    head = model.model.get_output_embeddings() if hasattr(model.model, "get_output_embeddings") else None
    if isinstance(head, nn.Linear):
        return head.out_features
    return 0 if head is not None else getattr(model.model, "num_labels", 0)


def _problem_type(model: Any, logits: torch.Tensor, labels: torch.Tensor) -> str:
    kind = model.config.problem_type
    if kind is not None:
        return kind
    if logits.shape[1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _labels(batch: Any) -> torch.Tensor:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor):
        held = f"with the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else "which is no mapping"
        raise ValueError(
            f"The batch, a {type(batch).__name__} {held}, has no tensor 'labels', which a HuggingFace model's loss "
            f"needs. Add it in the data set or the collate function. Or: {_REMEDY}"
        )
    return labels


def _logits(model: Any, outputs: Any) -> torch.Tensor:
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
        held = f"with the keys {sorted(map(str, outputs))}"
    else:
        # Without return_dict: the loss, then the logits.
        logits = outputs[1] if isinstance(outputs, tuple) and len(outputs) > 1 else None
        held = f"of length {len(outputs)}" if isinstance(outputs, tuple) else ""
    if not isinstance(logits, torch.Tensor) or logits.dim() not in (2, 3):
        shape = f"; its 'logits' have shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else ""
        raise ValueError(
            f"{type(model.model).__name__} returned a {type(outputs).__name__} {held} without 'logits' of shape (M, C) "
            f"or (M, T, C){shape}, so the loss of each sample is not known. {_REMEDY}"
        )
    return logits


def _disagreement(logits: torch.Tensor, labels: torch.Tensor) -> str:
    return (
        f"batch['labels'] of shape {tuple(labels.shape)} do not go with 'logits' of shape {tuple(logits.shape)}: "
        f"expected one label for each {'position' if logits.dim() == 3 else 'sample, or output'}. {_REMEDY}"
    )
