"""``--register``: what a user's file adds, and what is said of one that cannot be used."""

from __future__ import annotations

import pickle
import re
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from composer.models import ComposerClassifier
from torch.nn import functional as F

from composer_gradmatch import register
from composer_gradmatch.rules.table import all_rules
from composer_gradmatch.studies.__main__ import main as studies
from composer_gradmatch.studies.engines.engine import run_all
from composer_gradmatch.studies.engines.local import Local
from composer_gradmatch.studies.planning import identity
from composer_gradmatch.studies.store import Run
from composer_gradmatch.studies.strategies import all_strategies
from composer_gradmatch.studies.tasks import do_run
from composer_gradmatch.train import build_trainer, check_config
from composer_gradmatch.train.command import main
from composer_gradmatch.train.config import ConfigError
from composer_gradmatch.train.register_files import file_contents, load_files, loaded_files
from composer_gradmatch.train.registry import resolve

pytestmark = pytest.mark.usefixtures("nothing_registered")

MINE = """
import torch
from torch import nn
from torch.nn import functional as F

import beside_it
from composer_gradmatch import register


@register.model
def my_net(width: int = 8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


@register.model
class MyNet(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.layer = nn.Linear(4, num_classes)

    def forward(self, batch):
        return self.layer(batch)


@register.data
class MyData(torch.utils.data.Dataset):
    def __init__(self, size: int = 64):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return beside_it.sample(index)


@register.rule(needs="losses", weighs=False)
def smallest_losses(candidates, m, *, skip: int = 0):
    return candidates.losses.argsort()[skip : skip + m], None


@register.loss
def smoothed(outputs, batch):
    return F.cross_entropy(outputs, batch[1], label_smoothing=0.3, reduction="none")
"""
BESIDE_IT = """
import torch

def sample(index):
    return torch.randn(4, generator=torch.Generator().manual_seed(index)), torch.tensor(index % 3)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_it.py").write_text(BESIDE_IT)
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "beside_it", raising=False)
    return tmp_path / "mine.py"


def config(**changes):
    own = {
        "max_duration": "2ba",
        "global_train_batch_size": 16,
        "model": {"name": "my_net", "num_classes": 3},
        "train_loader": {"name": "MyData"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "save_folder": None,
        "progress_bar": False,
    }
    return {**own, **changes}


def selecting(**arguments):
    return {"start": 0.0, "end": 1.0, "interrupt": 0, "keep": 0.5, **arguments}


def test_names_train_and_a_module_becomes_a_classifier(mine):
    load_files([mine])
    trainer = build_trainer(config(algorithms={"smallest_losses": selecting(skip=2)}))
    trainer.fit()
    (algorithm,) = trainer.state.algorithms
    assert isinstance(trainer.state.model, ComposerClassifier)
    assert len(algorithm.last_selection.indices) == 8
    trainer.close()


def test_a_loss_by_its_name_is_that_of_training_and_of_selection(mine):
    load_files([mine])
    model = {"name": "my_net", "num_classes": 3, "loss_fn": "smoothed"}
    trainer = build_trainer(config(model=model, algorithms={"gradmatch": selecting(loss_fn="smoothed")}))
    batch = next(iter(trainer.state.train_dataloader))
    outputs = trainer.state.model(batch)
    expected = F.cross_entropy(outputs, batch[1], label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(trainer.state.model.loss(outputs, batch), expected.mean())
    torch.testing.assert_close(trainer.state.model.loss(outputs, batch, reduction="none"), expected)
    torch.testing.assert_close(trainer.state.algorithms[0].loss_fn(outputs, batch), expected)
    trainer.fit()  # Which shows on the first batch that the two are one objective.
    trainer.close()
    with pytest.raises(ConfigError, match=r"gradmatch.loss_fn: unknown loss 'smooted'; did you mean 'smoothed'"):
        check_config(config(algorithms={"gradmatch": selecting(loss_fn="smooted")}))
    with pytest.raises(ConfigError, match=r"model.loss_fn: unknown loss 'smooted'; did you mean 'smoothed'"):
        check_config(config(model={**model, "loss_fn": "smooted"}))


def test_a_class_without_types_is_a_model_and_a_data_set_goes_to_a_loaders_workers(mine):
    load_files([mine])
    model = resolve("model", "MyNet")(num_classes=3, width="whatever it likes")
    assert isinstance(model, ComposerClassifier)
    assert model.module.layer.out_features == 3
    data = resolve("data set", "MyData")(size=5)
    assert torch.equal(pickle.loads(pickle.dumps(data))[1][0], data[1][0])


def test_arguments_and_names_are_checked_like_ours(mine):
    load_files([mine])
    wrong = config(
        model={"name": "my_net", "wdth": 3, "width": "wide"},
        train_loader={"name": "MyDate", "dataset": {"size": 3}},
        algorithms={"smallest_loses": selecting(), "smallest_losses": selecting(skip="two")},
    )
    with pytest.raises(ConfigError) as found:
        check_config(wrong)
    said = str(found.value)
    assert "model.wdth: unknown key; did you mean 'width'?" in said
    assert "model.width: expected int, got 'wide'" in said
    assert "train_loader.name: unknown data set 'MyDate'; did you mean 'MyData'?" in said
    assert "algorithms.smallest_loses: unknown algorithm 'smallest_loses'; did you mean 'smallest_losses'?" in said
    assert "algorithms.smallest_losses.skip: expected int, got 'two'" in said


def test_a_rule_is_a_strategy_and_a_study_knows_its_file(mine):
    assert "smallest_losses" not in all_strategies()
    plain = identity("accuracy", config())
    load_files([mine, mine])
    assert {"smallest_losses", "smallest_losses_reuse"} <= all_strategies().keys()
    assert all_rules()["smallest_losses"].needs == "losses"
    assert identity("accuracy", config()) == {**plain, "registered": {"mine.py": loaded_files()[mine.resolve()]}}


def rows_of_what_is_there(run):
    return [{"rules": " ".join(all_rules()), "model": resolve("model", "my_net")(num_classes=3).num_classes}], {}


def test_a_studys_worker_runs_the_files_too(mine):
    load_files([mine])
    sys.path.append(str(Path(__file__).parent))
    task = partial(do_run, "test_register:rows_of_what_is_there", files=file_contents())
    with closing(Local(1)) as engine:
        ((_, record),) = run_all(engine, task, [Run("accuracy", {}, {}, {})], mine.parent / "logs")
    assert record.error == ""
    assert "smallest_losses" in record.rows[0]["rules"]
    assert record.rows[0]["model"] == 3
    assert record.provenance["registered mine.py"].startswith("SHA-256 ")


def test_a_file_that_changes_during_a_study_is_refused(mine):
    load_files([mine])
    with pytest.raises(ConfigError, match=r"mine.py has changed since the study was started"):
        do_run("test_register:rows_of_what_is_there", Run("accuracy", {}, {}, {}), dict.fromkeys(file_contents(), b"0"))


BAD = {
    "raises.py": ("import torch\nx = 1 / 0\n", "raises.py:2: ZeroDivisionError: division by zero"),
    "deeper.py": ("def f():\n    raise KeyError('x')\n\n\nf()\n", "deeper.py:2: KeyError"),
    "broken.py": ("x = 1\ndef f(:\n", "broken.py:2: SyntaxError"),
    "leaves.py": ("raise SystemExit(0)\n", "leaves.py:1: SystemExit"),
    "nothing_in_it.py": ("x = 1\n", "nothing_in_it.py:1: registers nothing."),
    "twice.py": (
        "@register.model\ndef a(): ...\n@register.model\ndef a(): ...\n",
        r"twice.py:4: ValueError: A model 'a' is registered already, at .*twice.py:2.",
    ),
    "ours.py": ("@register.model\ndef digits_cnn(): ...\n", "ours.py:2: 'digits_cnn' is a name of this package"),
    "our_data.py": ("@register.data\ndef digits(): ...\n", "our_data.py:2: 'digits' is a name of this package"),
    "our_rule.py": ("@register.rule\ndef sam(candidates, m): ...\n", "our_rule.py:2: 'sam' is a name of this package"),
    "no_rule.py": ("@register.rule\ndef a(candidates): ...\n", "no_rule.py:2: A rule is called as"),
    "no_record.py": ("@register.rule(need=1)\ndef a(candidates, m): ...\n", "no_record.py:2: .*argument 'need'"),
    "clash.py": ("@register.rule\ndef a(candidates, m, *, keep=1): ...\n", "clash.py:2: .* has an option 'keep'"),
    "no_loss.py": (
        "@register.loss\ndef a(outputs): ...\n",
        r"no_loss.py:2: a loss is a function of \(outputs, batch\)",
    ),
    "no_function.py": ("register.model(3)\n", "no_function.py:2: TypeError: A model is registered as a function"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", [main, studies])
def test_a_file_that_cannot_be_used_is_told_in_one_line(name, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, message = BAD[name]
    uses_it = "register." in text
    (tmp_path / name).write_text(f"from composer_gradmatch import register\n{text}" if uses_it else text)
    words = [] if command is main else ["accuracy", "--out", "x"]
    assert command([*words, "any.yaml", "--register", name]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(message, said)
    assert not loaded_files()
    assert "a" not in all_rules()


def test_a_file_that_is_not_there_or_has_another_modules_name(mine, capsys):
    assert main(["any.yaml", "--register", "min.py"]) == 2
    assert "--register: there is no file min.py: did you mean 'mine.py'?" in capsys.readouterr().err
    (mine.parent / "json.py").write_text("")
    (mine.parent / "my-net.py").write_text("")
    for name, message in (("json.py", "the name of another module, json"), ("my-net.py", "the name of a module")):
        assert main(["any.yaml", "--register", name]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("returned", "arguments", "message"),
    [
        ("nn.Linear(4, 3)", {}, "returned a module, a Linear. Give model.num_classes"),
        ("nn.Linear(4, 3)", {"num_classes": 1}, "Give model.num_classes, at least 2"),
        ("None", {"num_classes": 3}, "returned nothing; expected a torch module"),
        ("ComposerClassifier(nn.Linear(4, 3), num_classes=3)", {"num_classes": 3}, "num_classes is for a plain module"),
    ],
)
def test_a_model_that_is_none(returned, arguments, message, tmp_path):
    file = tmp_path / "a_model.py"
    file.write_text(
        "from composer.models import ComposerClassifier\nfrom torch import nn\n\n"
        f"from composer_gradmatch import register\n\n@register.model\ndef net():\n    return {returned}\n"
    )
    load_files([file])
    with pytest.raises(ConfigError, match=rf"a_model.py:6: net .*{message}"):
        resolve("model", "net")(**arguments)


@pytest.mark.parametrize("returned", ["None", "'text'", "{}", "([1], [2])", "iter([])", "DataLoader([1])"])
def test_data_that_is_no_data_set(returned, tmp_path):
    file = tmp_path / "a_data_set.py"
    file.write_text(
        "from torch.utils.data import DataLoader\n\nfrom composer_gradmatch import register\n\n"
        f"@register.data\ndef data():\n    return {returned}\n"
    )
    load_files([file])
    with pytest.raises(ConfigError, match=r"a_data_set.py:5: data returned .*; expected a data set with a length"):
        resolve("data set", "data")()


def test_in_python_a_decorator_is_enough():
    @register.data
    def digits(split):
        return []

    with pytest.raises(ConfigError, match=r"test_register.py:\d+: 'digits' is a name of this package"):
        check_config(config())


def test_a_cell_of_a_notebook_may_be_run_again():
    def net():
        return None

    net.__module__ = "__main__"
    assert register.model(net) is register.model(net) is net
