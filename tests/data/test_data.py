"""Data sets in their real on-disk formats, and label noise."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import SAMPLES, write_cifar, write_imagenet32, write_svhn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets

from composer_gradmatch.data import SHAPES, NoisyLabels, cifar10, cifar100, imagenet32, mnist5k, svhn, synthetic
from composer_gradmatch.train.builders import build_loader
from composer_gradmatch.train.config import ConfigError

CIFAR = {
    "cifar10": (datasets.CIFAR10, cifar10, 10, (0.247, 0.2435, 0.2616)),
    "cifar100": (datasets.CIFAR100, cifar100, 100, (0.2673, 0.2564, 0.2762)),
}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_reads_the_published_format_and_augments_training_images_only(name, tmp_path, monkeypatch):
    kind, load, classes, deviations = CIFAR[name]
    write_cifar(tmp_path, kind, monkeypatch)
    train, test = load("train", root=str(tmp_path)), load("test", root=str(tmp_path))
    assert len(train) == SAMPLES * len(kind.train_list)
    assert len(test) == SAMPLES
    image, label = test[3]
    assert image.shape == SHAPES[name][0]
    assert label == 3 % classes
    # Undoing the standardisation gives back the pixels: of the same image, and of the three channels apart.
    assert torch.equal(test[3][0], image)
    published = torch.tensor(test.data[3]).permute(2, 0, 1).double() / 255
    for channel in range(3):
        slope, _ = np.polyfit(published[channel].flatten(), image[channel].flatten(), 1)
        assert 1 / slope == pytest.approx(deviations[channel], rel=1e-4)
    assert any(not torch.equal(train[0][0], train[0][0]) for _ in range(5))


def test_svhn_reads_the_published_format(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    test = svhn("test", root=str(tmp_path))
    assert len(test) == SAMPLES
    assert [test[i][1] for i in (0, 8, 9)] == [1, 9, 0]
    image = test[0][0]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image, torch.tensor(test.data[0]) / 255)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (lambda root: cifar10("train", root=root), "cifar-10-batches-py.*dataset.download=true"),
        (lambda root: cifar100("test", root=root), "cifar-100-python.*dataset.download=true"),
        (lambda root: svhn("train", root=root), "train_32x32.mat.*dataset.download=true"),
        (lambda root: imagenet32("train", root=root), "train_data_batch_1, .*image-net.org"),
        (lambda root: imagenet32("test", root=root), "val_data missing.*image-net.org"),
    ],
)
def test_missing_data_are_told_what_to_put_where(load, expected, tmp_path):
    with pytest.raises(FileNotFoundError, match=expected):
        load(str(tmp_path))


def test_a_wrong_split_is_refused(tmp_path):
    for load in (cifar10, cifar100, svhn, imagenet32, mnist5k):
        with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
            load("valid")


def test_imagenet32_is_joined_once_and_memory_mapped(tmp_path):
    write_imagenet32(tmp_path)
    train = imagenet32("train", root=str(tmp_path))
    assert isinstance(train.images, np.memmap)
    assert len(train) == 10 * SAMPLES
    content = pickle.loads((tmp_path / "train_data_batch_2").read_bytes())
    assert np.array_equal(train.images[SAMPLES + 5], content["data"][5].reshape(3, 32, 32))
    assert train.targets[SAMPLES + 5] == content["labels"][5] - 1
    assert train[0][0].shape == (3, 32, 32)
    made = (tmp_path / "train_images.npy").stat().st_mtime_ns
    (tmp_path / "train_data_batch_1").unlink()
    assert len(imagenet32("train", root=str(tmp_path))) == 10 * SAMPLES
    assert (tmp_path / "train_images.npy").stat().st_mtime_ns == made
    assert not list(tmp_path.glob(".train-*"))


def test_imagenet32_in_a_worker_process_maps_the_file_itself(tmp_path):
    write_imagenet32(tmp_path)
    test = imagenet32("test", root=str(tmp_path))
    pickled = pickle.dumps(test)
    assert len(pickled) < test.images.nbytes / 2
    assert torch.equal(pickle.loads(pickled)[7][0], test[7][0])
    loader = DataLoader(test, batch_size=16, num_workers=1)
    images, labels = next(iter(loader))
    assert images.shape == (16, 3, 32, 32)
    assert labels.tolist() == list(range(16))


def full_disk(*args):
    raise OSError("no space left")


def test_an_interrupted_conversion_is_made_again(tmp_path, monkeypatch):
    write_imagenet32(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            imagenet32("train", root=str(tmp_path))
    assert not list(tmp_path.glob("*.npy"))
    assert len(imagenet32("train", root=str(tmp_path))) == 10 * SAMPLES


class Evil:
    def __reduce__(self):
        return print, ("run by unpickling",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data": Evil(), "labels": []}, "builtins.print|__builtin__.print"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "labels"),
        ({"data": np.zeros((2, 3000), np.uint8), "labels": [1, 2]}, "reshape"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 2]}, "a label from 1 to 1000"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "each of the 2 images"),
    ],
)
def test_a_file_that_is_not_imagenet32_is_refused(content, expected, tmp_path, capfd):
    (tmp_path / "val_data").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=expected):
        imagenet32("test", root=str(tmp_path))
    assert "run by unpickling" not in capfd.readouterr().out


def test_mnist5k_splits_are_stratified_and_disjoint():
    train, test = mnist5k("train"), mnist5k("test")
    assert (len(train), len(test)) == (4000, 1000)
    assert torch.bincount(train.tensors[1]).tolist() == [400] * 10
    assert train.tensors[0].shape[1:] == SHAPES["mnist5k"][0]
    assert (train.tensors[0].min(), train.tensors[0].max()) == (0, 1)
    seen = {image.numpy().tobytes() for image in train.tensors[0]}
    assert not any(image.numpy().tobytes() in seen for image in test.tensors[0])


def test_synthetic_data_differ_between_splits_and_repeat_for_a_seed():
    one, again, test = (synthetic([3, 4], 5, 50, split=split) for split in ("train", "train", "test"))
    assert torch.equal(one.tensors[0], again.tensors[0])
    assert not torch.equal(one.tensors[0], test.tensors[0])
    assert one.tensors[0].shape == (50, 3, 4)
    assert set(one.tensors[1].tolist()) == set(range(5))
    with pytest.raises(ValueError, match="Sizes must be positive"):
        synthetic([3, 0], 5)


def labelled(samples, classes=4):
    return TensorDataset(torch.randn(samples, 2), torch.arange(samples) % classes)


@given(st.integers(4, 200), st.floats(0, 1), st.integers(0, 2**31))
def test_label_noise_is_where_the_seed_says(samples, fraction, seed):
    noisy = NoisyLabels(labelled(samples), fraction, seed)
    assert len(noisy.noisy_indices) == round(fraction * samples)
    # Of the seed alone: other labels, the same places; a smaller fraction is a part of a larger one.
    other = NoisyLabels(labelled(samples, classes=2), fraction, seed)
    assert np.array_equal(noisy.noisy_indices, other.noisy_indices)
    assert set(NoisyLabels(labelled(samples), fraction / 2, seed).noisy_indices) <= set(noisy.noisy_indices)
    clean = set(range(samples)) - set(noisy.noisy_indices)
    assert all(noisy[i][1] == i % 4 for i in clean)
    assert all(torch.equal(noisy[i][0], noisy.dataset[i][0]) for i in range(samples))


def test_noisy_labels_are_uniform_over_the_classes():
    noisy = NoisyLabels(labelled(8000), 0.5, seed=1)
    drawn = [int(noisy[int(i)][1]) for i in noisy.noisy_indices]
    assert np.bincount(drawn) / len(drawn) == pytest.approx([0.25] * 4, abs=0.03)
    changed = np.mean([label != i % 4 for i, label in zip(noisy.noisy_indices, drawn, strict=True)])
    assert changed == pytest.approx(0.75, abs=0.03)


class Samples(Dataset):
    """Without targets or labels, of a dict or a tuple a sample."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_label_noise_finds_labels_in_any_data_set_and_keeps_their_type():
    tuples = NoisyLabels(Samples([(torch.zeros(1), i % 3) for i in range(30)]), 1.0, 0)
    assert {type(label) for _, label in (tuples[i] for i in range(30))} == {int}
    dicts = NoisyLabels(Samples([{"x": 0, "y": torch.tensor(i % 3)} for i in range(30)]), 1.0, 0, target_key="y")
    assert {dicts[i]["y"].dtype for i in range(30)} == {torch.int64}
    assert any(int(dicts[i]["y"]) != i % 3 for i in range(30))
    with pytest.raises(ValueError, match="one integer label a sample, got float"):
        NoisyLabels(Samples([(0, 0.5)] * 3), 0.1, 0)
    with pytest.raises(ValueError, match=r"label_noise.fraction must be in \[0, 1\]"):
        NoisyLabels(labelled(8), 1.5, 0)


def test_label_noise_from_yaml_reaches_the_loader():
    section = {"name": "digits", "dataset": {"split": "train"}, "label_noise": {"fraction": 0.25, "seed": 3}}
    loader = build_loader(section, 100, "train_loader")
    assert isinstance(loader.dataset, NoisyLabels)
    assert len(loader.dataset.noisy_indices) == round(0.25 * 1437)
    with pytest.raises(ConfigError, match=r"train_loader: label_noise\.fraction must be"):
        build_loader({**section, "label_noise": {"fraction": 2.0, "seed": 3}}, 100, "train_loader")
