"""``--init``: a config to start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_gradmatch.train import check_config
from composer_gradmatch.train.command import main
from composer_gradmatch.train.config import load_config

pytestmark = pytest.mark.usefixtures("nothing_registered")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("model", "data"), [("digits_cnn", "digits"), ("resnet18_cifar", "cifar100")])
def test_it_writes_a_config_that_is_right(model, data, capsys):
    assert main(["--init", "mine.yaml", "--model", model, "--data", data, "algorithms.gradmatch.keep=0.2"]) == 0
    assert "Wrote mine.yaml. Next: python -m composer_gradmatch.train mine.yaml\n" in capsys.readouterr().out
    config = load_config("mine.yaml")
    check_config(config)
    assert config["model"] == {"name": model, "num_classes": 100 if data == "cifar100" else 10}
    assert config["train_loader"]["dataset"] == {"split": "train"}
    assert config["eval_loader"] == {"name": data, "dataset": {"split": "test"}}
    assert config["algorithms"]["gradmatch"]["keep"] == 0.2


def test_what_has_a_default_stands_in_a_comment_and_what_has_none_is_to_be_given(capsys):
    assert main(["--init", "text.yaml", "--model", "bert", "--data", "imdb", "model.pretrained=tiny"]) == 0
    assert "Give train_loader.dataset.tokenizer, eval_loader.dataset.tokenizer in it" in capsys.readouterr().out
    text = Path("text.yaml").read_text()
    assert "  # num_labels: 2  # int\n" in text
    assert "  # dataset.download: false  # bool\n" in text
    assert main(["text.yaml"]) == 2
    assert "Missing mandatory value: tokenizer" in capsys.readouterr().err
    text = text.replace("'???'", "tiny").replace("  # num_labels", "  num_labels")
    Path("text.yaml").write_text(text)
    check_config(load_config("text.yaml"))
    assert load_config("text.yaml")["model"] == {"name": "bert", "pretrained": "tiny", "num_labels": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "digit_cnn"], "--model: unknown model 'digit_cnn'; did you mean 'digits_cnn'?"),
        (["--data", "digit"], "--data: unknown data set 'digit'; did you mean 'digits'?"),
        (["model.num_classes=many"], "model.num_classes: expected int, got 'many'"),
        (["=3"], "Overrides have the form key.sub=value"),
    ],
)
def test_what_it_refuses_is_not_written(words, message, empty_folder, capsys):
    assert main(["--init", "mine.yaml", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(empty_folder.iterdir())


def test_it_overwrites_nothing_and_says_where_it_cannot_write(empty_folder, capsys):
    (empty_folder / "mine.yaml").write_text("mine: 1\n")
    assert main(["--init", "mine.yaml"]) == 2
    assert "mine.yaml is there already" in capsys.readouterr().err
    assert (empty_folder / "mine.yaml").read_text() == "mine: 1\n"
    assert main(["--init", "nowhere/mine.yaml"]) == 2
    assert "cannot write nowhere/mine.yaml" in capsys.readouterr().err


def test_names_without_init_are_no_overrides(capsys):
    with pytest.raises(SystemExit):
        main(["mine.yaml", "--model", "digits_cnn"])
    assert "--model and --data go with --init" in capsys.readouterr().err
