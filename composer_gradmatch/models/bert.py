"""BERT and its like: any HuggingFace checkpoint, as a classifier of texts."""

from __future__ import annotations

from composer.metrics import CrossEntropy
from composer.models import HuggingFaceModel
from torchmetrics.classification import MulticlassAccuracy

from composer_gradmatch.models.pretrained import load_pretrained, load_tokenizer

__all__ = ["bert"]


def bert(pretrained: str, num_labels: int = 2, from_scratch: bool = False) -> HuggingFaceModel:
    """Gives a HuggingFace model for sequence classification, with its tokenizer and the checkpoint's own dropout.

    An output layer that the checkpoint lacks is drawn at random.

    Args:
        pretrained (str): A name on the HuggingFace hub, a local folder, or ``package:NAME/PATH`` for a path inside an
            installed package. No code of the checkpoint's own is run.
        num_labels (int, optional): Classes. Default: ``2``.
        from_scratch (bool, optional): Whether to draw all weights at random, as the checkpoint's config says, instead
            of loading them. Default: ``False``.

    Returns:
        HuggingFaceModel: For batches {input_ids, attention_mask, labels, and whatever else its tokenizer gives},
        int64 of shape (M, L) but the labels' (M,).

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ImportError: If transformers, or the package that holds the checkpoint, is not installed.
        ValueError: If ``num_labels`` is below 2 or not that of the checkpoint's output layer, or ``pretrained`` names
            no classifier.
    """
    if num_labels < 2:
        raise ValueError(f"num_labels must be at least 2, the number of classes; got {num_labels}.")
    tokenizer = load_tokenizer(pretrained)
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = load_pretrained(AutoConfig, pretrained, num_labels=num_labels)
    if from_scratch:
        network = AutoModelForSequenceClassification.from_config(config)
    else:
        try:
            network = load_pretrained(AutoModelForSequenceClassification, pretrained, config=config)
        except RuntimeError as error:
            raise ValueError(
                f"The weights of {pretrained!r} do not fit num_labels={num_labels}. Set num_labels to the number of "
                f"classes that it was trained for. HuggingFace says: {error}"
            ) from error
    metrics = [MulticlassAccuracy(num_classes=num_labels, average="micro"), CrossEntropy()]
    return HuggingFaceModel(network, tokenizer, use_logits=True, metrics=metrics)
