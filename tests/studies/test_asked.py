"""The studies from Python: by a config as the command line does, and by a function that makes a Trainer's arguments."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from composer import Trainer
from composer.algorithms import LabelSmoothing
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingScheduler
from composer.utils import dist
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from composer_gradmatch import GradMatch
from composer_gradmatch.data.digits import digits
from composer_gradmatch.models.digits_cnn import digits_cnn
from composer_gradmatch.studies import accuracy, verdict
from composer_gradmatch.studies.__main__ import main
from composer_gradmatch.studies.building import ByNames, built_by
from composer_gradmatch.studies.made import Made
from composer_gradmatch.studies.strategies import with_strategy
from composer_gradmatch.studies.verdict.runs import validating
from composer_gradmatch.train.config import ConfigError, load_config

ON = {"start": 0.0, "end": 1.0, "keep": 0.5, "interrupt": 0}
DIGITS = str(Path(__file__).resolve().parents[2] / "configs" / "digits.yaml")
SHORT = {"strategies": ["random", "full"], "keep": [0.3], "seeds": 1, "rounds": 1}


def digits_again(lr=0.05, seed=0):
    """What configs/digits.yaml describes, but for a smaller network, in the order that the runner builds it in."""
    train = digits("train")
    sampler = dist.get_sampler(train, shuffle=True, drop_last=True)
    train_loader = DataLoader(train, batch_size=128, sampler=sampler, drop_last=True)
    eval_loader = DataLoader(digits("test"), batch_size=128)
    model = digits_cnn(num_classes=10, width=4)
    return {
        "model": model,
        "train_dataloader": train_loader,
        "eval_dataloader": eval_loader,
        "optimizers": torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
        "schedulers": CosineAnnealingScheduler(alpha_f=0.0),
        "max_duration": "1ep",
    }


def blobs(samples, seed):
    """Two classes of points that a line tells apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 2
    return TensorDataset(torch.randn(samples, 2, generator=generator) + 2 * labels[:, None], labels)


def tiny(lr=0.1, seed=0, **changes):
    model = ComposerClassifier(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), num_classes=2)
    return {
        "model": model,
        "train_dataloader": DataLoader(blobs(64, 0), batch_size=16, shuffle=True),
        "eval_dataloader": DataLoader(blobs(40, 1), batch_size=20),
        "optimizers": torch.optim.SGD(model.parameters(), lr=lr),
        "max_duration": 1,
        **changes,
    }


def accuracies(frame):
    return frame.sort_values(["strategy", "keep", "seed"])[["strategy", "best_accuracy", "last_accuracy"]].to_numpy()


def test_a_function_gives_the_accuracies_that_the_command_line_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ByNames, "here", True)  # Quicker than in processes of their own, and the same.
    words = ["--strategies", "random", "full", "--keep", "0.3", "--seeds", "1", "--rounds", "1"]
    smaller = ["max_duration=1ep", "model.width=4"]
    out = tmp_path / "command"
    assert main(["accuracy", DIGITS, "--out", str(out), *words, *smaller]) == 0
    capsys.readouterr()
    records = {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")}
    # The same study from Python goes on in the folder: there is nothing left to do.
    of_config = accuracy(load_config(DIGITS, smaller), out=out, **SHORT)
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")} == records
    of_function = accuracy(digits_again, out=tmp_path / "function", **SHORT)
    assert len(of_function.frame) == 2
    np.testing.assert_array_equal(accuracies(of_function.frame), accuracies(of_config.frame))
    assert set(of_function.figures) == set(of_config.figures) == {"accuracy", "accuracy_over_cost", "time_to_accuracy"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    style = dict(mpl.rcParams)
    out = tmp_path_factory.mktemp("compared")
    strategies = ["random", "gradmatch_stored", "full"]
    result = accuracy(tiny, out=out, strategies=strategies, keep=[0.5], seeds=2, rounds=1)
    assert dict(mpl.rcParams) == style
    return result


def test_the_result_has_tables_figures_and_an_answer(compared):
    assert (compared.frame["status"] == "done").all()
    assert len(compared.frame) == 6
    summary = compared.summary.set_index("strategy")
    own = compared.frame.groupby("strategy")["last_accuracy"]
    assert summary["last_accuracy"].to_dict() == pytest.approx(own.mean().to_dict())
    assert summary["last_accuracy_min"].to_dict() == own.min().to_dict()
    paired = own.apply(list)
    difference = np.subtract(paired["gradmatch_stored"], paired["random"]).mean()
    assert summary.loc["gradmatch_stored", "last_minus_random_equal_keep"] == pytest.approx(difference)
    assert (summary["cost"] > 0).all()
    assert "gradmatch_stored at keep 0.5" in compared.answer
    assert compared.answer in (compared.folder / "summary.md").read_text()
    assert repr(compared).startswith(compared.answer)
    page = compared._repr_html_()
    assert "<h2>Verdict</h2>" in page
    assert "<style>" not in page, "it would change the notebook around it"
    assert all(isinstance(each, Figure) for each in compared.figures.values())
    assert all((compared.folder / f"{name}.png").is_file() for name in compared.figures)
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        assert not pyplot.get_fignums(), "a notebook would show these by itself"


def test_it_goes_on_with_the_missing_runs_and_knows_its_function_again(compared):
    made = []

    def counting(lr=0.1, seed=0):
        made.append(seed)
        return tiny(lr, seed)

    # The one folder for one function: another source is another study.
    with pytest.raises(ConfigError, match=r"out .* holds another study; different: .*config.make.source"):
        accuracy(counting, out=compared.folder, strategies=["random", "full"], keep=[0.5], seeds=2, rounds=1)
    with pytest.raises(ConfigError, match=r"config.make.version \('', now '2'\)"):
        accuracy(tiny, out=compared.folder, strategies=["full"], keep=[0.5], version="2")
    before = {path.name for path in compared.folder.glob("runs/*.json")}
    more = accuracy(tiny, out=compared.folder, strategies=["random", "full"], keep=[0.5], seeds=3, rounds=1)
    new = {path.name for path in compared.folder.glob("runs/*.json")} - before
    assert sorted(name[:15] for name in new if not name.startswith("step-time")) == [
        "accuracy-full-k",
        "accuracy-random",
    ]
    assert len(more.frame) == 8


def test_comments_and_layout_do_not_make_another_function():
    def one(lr=0.1):
        return tiny(lr)

    first = Made(one, varies_rate=False).config["make"]

    def one(lr=0.1):
        # The same.
        return tiny(
            lr,
        )

    assert Made(one, varies_rate=False).config["make"] == first
    assert first["source"] != "unknown"


def test_a_verdict_of_a_function(tmp_path):
    result = verdict(tiny, out=tmp_path, budget=30, strategies=["random"], keep=[0.5], margin=0.3, seed=3)
    assert result.answer in (tmp_path / "summary.md").read_text()
    assert {"random", "full"} == set(result.summary["strategy"])
    assert set(result.figures) == {"verdict", "time_to_accuracy"}
    assert (result.frame["status"] == "done").all()
    assert result.frame["seed"].min() >= 3
    assert "<blockquote>" in result._repr_html_()
    assert "Traceback" not in "".join(path.read_text() for path in tmp_path.glob("logs/*"))


def test_rates_are_chosen_on_samples_that_are_not_trained_on():
    made = Made(tiny, varies_rate=True)
    config = with_strategy({**validating(made.config, 0.25, 0), "seed": 1, "run_name": "x"}, "random", 0.5)
    with built_by(made, made.config):
        trainer = made.trainer(config)
        train = [tuple(row.tolist()) for row, _ in trainer.state.train_dataloader.dataset]
        held = [tuple(row.tolist()) for row, _ in trainer.state.evaluators[0].dataloader.dataloader.dataset]
        trainer.close()
    everything = {tuple(row.tolist()) for row, _ in blobs(64, 0)}
    assert (len(train), len(held)) == (48, 16)
    assert set(train) | set(held) == everything
    assert made.batches(config) == 3


def test_a_run_is_the_trainer_that_the_function_describes():
    def own(lr=0.1, seed=0):
        return tiny(lr, seed, algorithms=LabelSmoothing(0.1), train_dataloader=seeded)

    generator = torch.Generator().manual_seed(7)
    seeded = DataLoader(blobs(64, 0), batch_size=16, shuffle=True, generator=generator)
    made = Made(own, varies_rate=True, algorithms={"gradmatch": {"start": 0.0, "end": 1.0, "interrupt": 0}})
    config = {**with_strategy(made.config, "gradmatch", 0.5), "seed": 5}
    weights = []
    for rate in (0.2, 0.2, 0.3):
        trainer = made.trainer({**config, "optimizer": {**config["optimizer"], "lr": rate}})
        kinds = {type(each) for each in trainer.state.algorithms}
        trainer.fit()
        trainer.close()
        weights.append(torch.cat([each.detach().flatten() for each in trainer.state.model.parameters()]))
    assert kinds >= {GradMatch, LabelSmoothing}
    assert torch.equal(weights[0], weights[1]), "the loader's own generator goes through other runs"
    assert not torch.equal(weights[0], weights[2])


def changed(**changes):
    def make(lr=0.1, seed=0):
        return {key: value for key, value in tiny(lr, seed, **changes).items() if value is not None}

    return make


class Stream(IterableDataset):
    def __iter__(self):
        yield from blobs(64, 0)


MODEL = tiny()["model"]
SAMPLER = DataLoader(blobs(64, 0), batch_size=16, sampler=WeightedRandomSampler([1.0] * 64, 64))
EPOCHS = {"max_duration": "4ba"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda lr=0.1: 3, "expected a dict of a Trainer's arguments, got int"),
        (changed(max_duration=None), "make: max_duration is missing"),
        (changed(eval_dataloader=None), "make: eval_dataloader is missing"),
        (changed(eval_loader=1), "Trainer takes no 'eval_loader'; did you mean 'eval_dataloader'"),
        (changed(model=nn.Linear(2, 2)), "model must be a ComposerModel"),
        (changed(eval_dataloader=[1]), "eval_dataloader must be a torch DataLoader; got list"),
        (
            changed(algorithms=GradMatch(**ON)),
            "leave GradMatch out of its algorithms",
        ),
        (changed(optimizers=torch.optim.SGD(MODEL.parameters(), lr=0.1)), "parameters are not the model's"),
        (lambda seed=0: tiny(0.1, seed), "must take the learning rate as lr"),
        (lambda lr, seed=0: tiny(lr, seed), "whose default is the one"),
        (lambda lr=0.1, seed=0: tiny(0.1, seed), "ignores its lr: the optimizer has the rate 0.1"),
        (
            lambda lr=0.1: tiny(lr, model=MODEL, optimizers=torch.optim.SGD(MODEL.parameters(), lr)),
            "returns the same model in each call",
        ),
        (changed(train_dataloader=DataLoader(Stream(), batch_size=16), **EPOCHS), "Stream is a stream"),
        (changed(train_dataloader=SAMPLER), "it has a WeightedRandomSampler"),
    ],
)
def test_what_a_verdict_cannot_be_made_of_is_refused_before_anything_is_trained(make, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        verdict(make, out=tmp_path / "out", budget="1m", margin=0.3)
    assert said in str(error.value)
    assert not list(tmp_path.rglob("*.json"))


def test_a_stream_has_accuracies_too(tmp_path):
    stream = DataLoader(Stream(), batch_size=16, drop_last=True)
    result = accuracy(changed(train_dataloader=stream, **EPOCHS), out=tmp_path, **SHORT)
    assert (result.frame["status"] == "done").all()
    assert result.summary["cost"].notna().all()
    with pytest.raises(ConfigError, match=r"label noise needs a map-style data set, .* Stream is a stream"):
        accuracy(changed(train_dataloader=stream, **EPOCHS), out=tmp_path / "noise", label_noise=0.1, **SHORT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": [1.5]}, "keep: expected a fraction in (0, 1), got '1.5'"),
        ({"keep": 0.3}, "keep: expected a list"),
        ({"strategies": ["best"]}, "strategies: unknown strategy 'best'"),
        ({"strategies": "full"}, "strategies: expected a list"),
        ({"seeds": 0}, "seeds: expected a positive integer"),
        ({"jobs": 2}, "jobs: a function's runs are made in this process"),
        ({"batch_size": 3}, "batch_size: expected 'fixed' or 'scaled', got 3"),
        ({"metric": "F1"}, "metric: the model has no evaluation metric F1"),
        ({"algorithms": {"gradmatch": {"solver": "lasso"}}}, "solver"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        accuracy(tiny, out=tmp_path / "out", **options)
    assert said in str(error.value)
    assert not list(tmp_path.rglob("*.json"))


def test_a_verdict_says_what_is_wrong_with_its_budget_and_a_config_what_goes_with_functions_only(tmp_path):
    with pytest.raises(ConfigError, match="budget: expected a time such as 2h"):
        verdict(tiny, out=tmp_path, budget="soon")
    with pytest.raises(ConfigError, match="algorithms, version: they go with a function"):
        accuracy(DIGITS, out=tmp_path, version="2")
    with pytest.raises(ConfigError, match="There is no config file"):
        accuracy("configs/none.yaml", out=tmp_path)


def test_a_script_that_its_workers_would_start_again_is_refused(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("from composer_gradmatch.studies import accuracy\naccuracy('digits.yaml', out='out')\n")
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ConfigError, match="under if __name__ == '__main__'"):
        accuracy(DIGITS, out=tmp_path / "out")


def test_what_the_study_says_itself_is_known_to_the_trainer():
    from composer_gradmatch.studies import made

    assert set(inspect.signature(Trainer).parameters) >= {*made._STUDYS, *made._STUDYS_TOO, *made._RECKONED}
