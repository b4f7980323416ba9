"""IMDB's movie reviews, positive or negative (Maas et al., 2011), from their published folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from composer.utils import dist

from composer_gradmatch.data.split import check_split
from composer_gradmatch.data.text import TokenizedTexts

__all__ = ["imdb"]

_ARCHIVE = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
_HUB = "stanfordnlp/imdb"
_FILE = re.compile(r"(\d+)_\d+\.txt")

Reviews = tuple[list[str], list[int]]


def _read_folder(root: Path, split: str) -> Reviews:
    """Gives the texts of neg and pos, each in the order of the numbers that their file names begin with."""
    texts, labels = [], []
    for label, folder in enumerate((root / split / "neg", root / split / "pos")):
        files = {int(match[1]): path for path in folder.glob("*.txt") if (match := _FILE.fullmatch(path.name))}
        if not files:
            raise FileNotFoundError(
                f"The IMDB reviews are not in {root}: {folder} holds no file such as 0_9.txt. Unpack {_ARCHIVE} so "
                f"that {root} has train/pos, train/neg, test/pos and test/neg, set dataset.root to the folder that has "
                "them (or to one that HuggingFace datasets saved), or set dataset.download=true."
            )
        texts += [files[number].read_text(encoding="utf-8") for number in sorted(files)]
        labels += [label] * len(files)
    return texts, labels


def _read_datasets(root: Path, split: str, download: bool) -> Reviews:
    """Gives the same from HuggingFace datasets: what it saved in ``root``, or what it gets from the hub."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("imdb needs HuggingFace datasets for this: pip install 'composer-gradmatch[nlp]'.") from error
    rows: Any
    if not download:
        saved: Any = datasets.load_from_disk(str(root))
        if split not in saved:
            raise ValueError(f"The data set saved in {root} has no split {split!r}, only {', '.join(map(str, saved))}.")
        rows = saved[split]
    else:
        try:
            with dist.run_local_rank_zero_first():
                rows = datasets.load_dataset(_HUB, split=split)
        except OSError as error:
            raise FileNotFoundError(
                f"{_HUB} could not be downloaded ({error}). Unpack {_ARCHIVE} in its place and set dataset.root to the "
                "folder aclImdb."
            ) from error
    return list(rows["text"]), list(rows["label"])


def imdb(
    split: Literal["train", "test"],
    tokenizer: str,
    max_length: int = 512,
    root: str = "data/aclImdb",
    download: bool = False,
) -> TokenizedTexts:
    """Reads IMDB: 25,000 training and 25,000 test reviews, half of each positive (label 1) and half negative (0).

    Args:
        split (str): ``"train"`` or ``"test"``.
        tokenizer (str): A checkpoint's name on the HuggingFace hub, its local folder, or ``package:NAME/PATH``.
        max_length (int, optional): L, tokens a review. Default: ``512``.
        root (str, optional): The folder that ``aclImdb_v1.tar.gz`` unpacks to, or one that HuggingFace datasets'
            ``DatasetDict.save_to_disk`` wrote. Default: ``"data/aclImdb"``.
        download (bool, optional): Whether to have HuggingFace datasets get (and cache) the reviews where ``root`` has
            none. Default: ``False``.

    Returns:
        TokenizedTexts: Of {input_ids, attention_mask, ..., int64, shape (L,), labels, int64, shape ()}.

    Raises:
        FileNotFoundError: If the reviews or the tokenizer are not there.
        ImportError: If transformers, or datasets where it is needed, is not installed.
        ValueError: If ``split`` is neither, or ``max_length`` is not in the tokenizer's range.
    """
    check_split(split)
    folder = Path(root)
    if (folder / "dataset_dict.json").is_file():
        texts, labels = _read_datasets(folder, split, download=False)
    elif download and not (folder / split).is_dir():
        texts, labels = _read_datasets(folder, split, download=True)
    else:
        texts, labels = _read_folder(folder, split)
    return TokenizedTexts(texts, labels, tokenizer, max_length)
