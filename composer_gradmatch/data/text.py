"""What the text data sets share: texts, tokenised once, as samples of fixed length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from composer_gradmatch.models.pretrained import load_tokenizer

__all__ = ["TokenizedTexts"]

# Texts tokenised at a time: what the tokenizer makes of each is many times as large as its tokens.
_CHUNK = 1024


class TokenizedTexts(Dataset):
    """Texts as dicts of tokens, cut or padded to one length so that they stack, each with its label.

    Args:
        texts (Sequence[str]): N texts.
        labels (Sequence[int]): Their labels.
        tokenizer (str): A checkpoint's name on the HuggingFace hub, its local folder, or ``package:NAME/PATH``.
        max_length (int): L, tokens a text, the special ones included.

    Attributes:
        tensors (dict[str, torch.Tensor]): ``input_ids``, ``attention_mask`` and whatever else the tokenizer gives,
            int64, shape (N, L), and ``labels``, int64, shape (N,).

    Raises:
        FileNotFoundError: If there is no such tokenizer.
        ImportError: If transformers, or the package that holds the tokenizer, is not installed.
        ValueError: If ``tokenizer`` names none, or ``max_length`` is not in its range.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int], tokenizer: str, max_length: int) -> None:
        encode = load_tokenizer(tokenizer)
        special, most = encode.num_special_tokens_to_add(), encode.model_max_length
        if not special < max_length <= most:
            raise ValueError(
                f"max_length must be from {special + 1} to {most} tokens for the tokenizer {tokenizer!r}; got "
                f"{max_length}."
            )
        parts = [
            encode(
                list(texts[start : start + _CHUNK]),
                padding="max_length",
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            for start in range(0, len(texts), _CHUNK)
        ]
        self.tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        self.tensors["labels"] = torch.tensor(labels, dtype=torch.int64)
        self.tokenizer = tokenizer

    @property
    def labels(self) -> torch.Tensor:
        """The labels, int64, shape (N,)."""
        return self.tensors["labels"]

    def texts(self, indices: Sequence[int]) -> list[str]:
        """Gives texts as far as they are among the tokens, to be read by people.

        Args:
            indices (Sequence[int]): Of which samples.
        """
        rows = self.tensors["input_ids"][list(indices)]
        return load_tokenizer(self.tokenizer).batch_decode(rows, skip_special_tokens=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: tensor[index] for key, tensor in self.tensors.items()}
