"""Tiny files in the real on-disk formats of the data sets, with known pixels."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from scipy.io import savemat
from torchvision import datasets

SAMPLES = 32


def _pixels(seed: int, samples: int = SAMPLES) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (samples, 3072), dtype=np.uint8)


def _dump(path: Path, content: dict, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def write_cifar(root: Path, kind: type[datasets.CIFAR10], monkeypatch) -> None:
    """As the archives unpack; only the published checksums, which no small file can have, are not checked."""
    folder = root / kind.base_folder
    fine = kind is datasets.CIFAR100
    classes = 100 if fine else 10
    for number, (name, _) in enumerate([*kind.train_list, *kind.test_list]):
        labels = [i % classes for i in range(SAMPLES)]
        _dump(folder / name, {"data": _pixels(number), "fine_labels" if fine else "labels": labels})
    _dump(folder / kind.meta["filename"], {kind.meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())


def write_svhn(root: Path, monkeypatch) -> None:
    """MATLAB files: X is (32, 32, 3, N) and the digit 0 has the label 10."""
    for seed, split in enumerate(("train", "test")):
        images = _pixels(seed).reshape(SAMPLES, 32, 32, 3).transpose(1, 2, 3, 0)
        labels = np.arange(SAMPLES, dtype=np.uint8).reshape(-1, 1) % 10 + 1
        root.mkdir(parents=True, exist_ok=True)
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": labels})
    monkeypatch.setattr(
        datasets.SVHN, "_check_integrity", lambda self: (Path(self.root) / f"{self.split}_32x32.mat").is_file()
    )


def write_imagenet32(root: Path) -> None:
    """Ten training pickles and one of validation images; labels count from 1."""
    for number in range(1, 11):
        labels = [(number * SAMPLES + i) % 1000 + 1 for i in range(SAMPLES)]
        content = {"data": _pixels(number), "labels": labels, "mean": _pixels(99, 1)[0].astype(np.float64)}
        _dump(root / f"train_data_batch_{number}", content, protocol=2 if number % 2 else 4)
    _dump(root / "val_data", {"data": _pixels(0), "labels": list(range(1, SAMPLES + 1))})


WORDS = ("film", "plot", "actor", "scene", "good", "fine", "bad", "dull")


def review(split: str, label: int, number: int) -> str:
    """The text of a tiny review; reviews differ in split, label or number."""
    verdict = WORDS[4:6] if label else WORDS[6:]
    words = [WORDS[number % 4], WORDS[number // 4 % 4], verdict[number % 2], *([WORDS[0]] if split == "test" else [])]
    return " ".join(words * (1 + number // 16)) + "<br /><br />ça !"


def write_imdb(root: Path) -> None:
    """As aclImdb_v1.tar.gz unpacks: SAMPLES files of each label in each split, and what lies beside them."""
    for split in ("train", "test"):
        for label, name in enumerate(("neg", "pos")):
            (root / split / name).mkdir(parents=True)
            for number in range(SAMPLES):
                rating = 7 + number % 4 if label else 1 + number % 4
                path = root / split / name / f"{number}_{rating}.txt"
                path.write_text(review(split, label, number), encoding="utf-8")
        (root / split / "labeledBow.feat").write_text("9 0:9 1:1\n")
    (root / "train" / "unsup").mkdir()
    (root / "train" / "unsup" / "0_0.txt").write_text("Without a label.")
    (root / "imdb.vocab").write_text("\n".join(WORDS))


def write_bert(folder: Path, num_labels: int = 2) -> str:
    """A BERT of two small layers with random weights and a vocabulary of WORDS; returns the folder."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=5 + len(WORDS), num_labels=num_labels, hidden_dropout_prob=0.25, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)
