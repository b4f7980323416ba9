"""The runner: YAML toggles, errors before any work, resuming, the closing table, LLM Foundry's entry points."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml
from composer.algorithms import SelectiveBackprop

from composer_gradmatch import GradMatch, LossBackprop, RandomBackprop
from composer_gradmatch.data import digits
from composer_gradmatch.models import digits_cnn
from composer_gradmatch.train import check_config, main, train
from composer_gradmatch.train.builders import build_algorithms
from composer_gradmatch.train.config import ConfigError, load_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
KEEP = "{start: 0.0, end: 1.0, keep: 0.3, interrupt: 0}"


def short(tmp_path, *overrides):
    return load_config(
        CONFIG, [f"save_folder={tmp_path}/{{run_name}}", "max_duration=3ba", "progress_bar=false", *overrides]
    )


@pytest.mark.parametrize(
    ("name", "algorithm_class", "backpropagated"),
    [
        ("gradmatch", GradMatch, 114),
        ("random_backprop", RandomBackprop, 114),
        ("loss_backprop", LossBackprop, 114),
        ("selective_backprop", SelectiveBackprop, 114),
        (None, None, 384),
    ],
)
def test_one_yaml_toggles_between_strategies(name, algorithm_class, backpropagated, tmp_path, capfd):
    toggle = [] if name in (None, "gradmatch") else [f"algorithms.{name}={KEEP}"]
    if name != "gradmatch":
        toggle.append("algorithms.gradmatch=false")
    trainer = train(short(tmp_path, *toggle, "eval_interval=3ba"))
    assert [type(a) for a in trainer.state.algorithms] == ([] if name is None else [algorithm_class])
    table = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines() if "  " in line)
    table = {key.strip(): value.strip() for key, value in table.items()}
    assert table["samples forwarded"] == "384"
    shown = int(table["samples backpropagated"].split()[0].replace(",", ""))
    assert shown <= backpropagated if name == "gradmatch" else shown == backpropagated
    assert 0 <= float(table["best eval/MulticlassAccuracy"]) <= 1
    assert ("mean matching residual" in table) == (name == "gradmatch")
    assert ("selection steps" in table) == (name in ("gradmatch", "random_backprop", "loss_backprop"))


def test_the_resolved_config_and_checkpoints_are_in_the_run_folder(tmp_path):
    train(short(tmp_path, "algorithms.gradmatch.keep=0.2"))
    folder = tmp_path / "digits-gradmatch"
    assert yaml.safe_load((folder / "config.yaml").read_text())["algorithms"]["gradmatch"]["keep"] == 0.2
    assert (folder / "latest-rank0.pt").exists()
    assert "gradmatch/matching_residual" in (folder / "logs-part1-rank0.txt").read_text()
    with pytest.raises(ConfigError, match=r"already holds a run.*run_name.*autoresume=true.*save_overwrite=true"):
        train(short(tmp_path))


def test_a_run_that_could_not_be_built_leaves_its_folder_free(tmp_path):
    with pytest.raises(ValueError, match="not supported for CPU"):
        train(short(tmp_path, "precision=amp_bf16", "device=cpu"))
    train(short(tmp_path))


def test_a_resumed_run_ends_as_the_uninterrupted_one_and_its_table_covers_both_parts(tmp_path, capfd):
    whole = train(short(tmp_path / "a", "max_duration=8ba"))
    table = capfd.readouterr().out
    # One run of eight batches leaves a checkpoint after five, from which another goes on.
    train(short(tmp_path / "b", "max_duration=8ba", "save_interval=5ba", "save_num_checkpoints_to_keep=-1"))
    folder = tmp_path / "b" / "digits-gradmatch"
    for path in [*folder.glob("*ba8*"), *folder.glob("latest*")]:
        path.unlink()
    capfd.readouterr()
    resumed = train(
        short(tmp_path / "b", "max_duration=8ba", "autoresume=true", f"load_path={next(folder.glob('*ba5*'))}")
    )
    for key, value in whole.state.model.state_dict().items():
        assert torch.equal(resumed.state.model.state_dict()[key], value), key
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("samples", "mean", "selection"))]
    assert len(lines) == 6
    assert all(line in table for line in lines)
    assert (folder / "logs-part2-rank0.txt").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_duratoin=3ep", "max_duratoin: unknown key; did you mean 'max_duration'"),
        ("algorithms.gradmach={}", "algorithms.gradmach: unknown algorithm 'gradmach'; did you mean 'gradmatch'"),
        ("algorithms.gradmatch.kep=0.3", "algorithms.gradmatch.kep: unknown key; did you mean 'keep'"),
        ("algorithms.gradmatch.keep=lots", "algorithms.gradmatch.keep: expected float, got 'lots'"),
        ("algorithms.gradmatch.interrupt=0.5", "algorithms.gradmatch.interrupt: expected int, got 0.5"),
        ("algorithms.gradmatch.keep=7", r"algorithms.gradmatch: keep must be in \(0, 1\]"),
        ("algorithms.random_backprop.scale_factor=1.0", "algorithms.random_backprop.scale_factor: unknown key"),
        ("optimizer.name=sdg", "optimizer.name: unknown optimizer 'sdg'; did you mean 'sgd'"),
        ("optimizer.momentun=0.9", "optimizer.momentun: unknown key; did you mean 'momentum'"),
        ("scheduler.name=cosin", "scheduler.name: unknown scheduler 'cosin'; did you mean 'cosine'"),
        ("model.num_classes=ten", "model.num_classes: expected int, got 'ten'"),
        ("model.name=os.system", "model.name: unknown model 'os.system'"),
        ("train_loader.shufle=true", "train_loader.shufle: unknown key; did you mean 'shuffle'"),
        ("train_loader.dataset.split=valid", "train_loader.dataset.split: expected 'train' or 'test', got 'valid'"),
        ("callbacks.speed_monitr={}", "callbacks.speed_monitr: unknown callback.*did you mean 'speed_monitor'"),
        ("loggers.fil={}", "loggers.fil: unknown logger 'fil'; did you mean 'file'"),
        ("global_train_batch_size=many", "global_train_batch_size: got 'many'"),
        ("global_train_batch_size=0", "global_train_batch_size: "),
        ("seed=yes", "seed: got True"),
        ("model=null", "model: missing"),
        ("train_loader=null", "train_loader: missing"),
    ],
)
def test_a_wrong_config_is_refused_before_any_work(override, message, tmp_path, monkeypatch):
    def must_not_run(*args, **kwargs):
        raise AssertionError("work was started")

    monkeypatch.setattr("composer_gradmatch.train.trainer.build_loader", must_not_run)
    with pytest.raises(ConfigError, match=message):
        train(short(tmp_path, override))


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        check_config(short(tmp_path, "optimizer.momentun=0.9", "optimizer.lr=fast", "sede=1"))
    assert len(str(caught.value).splitlines()) == 3


def test_false_switches_entries_off_and_nothing_takes_defaults(tmp_path):
    config = short(tmp_path, "callbacks.speed_monitor=false", "algorithms.gradmatch=null", "algorithms.ema=false")
    check_config(config)
    (algorithm,) = build_algorithms(config["algorithms"])
    assert isinstance(algorithm, GradMatch)
    assert (algorithm.start, algorithm.end, algorithm.keep, algorithm.interrupt) == (0.5, 0.9, 0.5, 2)


def test_files_and_overrides_that_cannot_be_read(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"did you mean .*digits\.yaml"):
        load_config(CONFIG.with_name("digit.yaml"))
    with pytest.raises(ConfigError, match=r"key\.sub=value; got 'keep'"):
        load_config(CONFIG, ["keep"])
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ConfigError, match="Cannot read"):
        load_config(bad)
    assert main([str(CONFIG), "sede=1"]) == 2
    assert "sede: unknown key; did you mean 'seed'" in capsys.readouterr().err


def test_variables_are_interpolated():
    config = load_config(CONFIG, ["variables.keep=0.25", "algorithms.gradmatch.keep=${variables.keep}"])
    check_config(config)
    assert config["algorithms"]["gradmatch"]["keep"] == 0.25


@pytest.mark.parametrize(
    ("name", "algorithm_class"),
    [("gradmatch", GradMatch), ("random_backprop", RandomBackprop), ("loss_backprop", LossBackprop)],
)
def test_llm_foundrys_entry_points_construct_from_yaml(name, algorithm_class):
    found = {point.name: point for point in entry_points(group="llmfoundry_algorithms")}
    if name not in found and "CI" not in os.environ:
        pytest.skip("the package is not installed")
    loaded = found[name].load()
    assert loaded is algorithm_class
    assert loaded(**yaml.safe_load(KEEP)).keep == 0.3


def test_llm_foundry_gets_any_rule_by_its_name():
    found = {point.name: point for point in entry_points(group="llmfoundry_algorithms")}
    if "rule_backprop" not in found and "CI" not in os.environ:
        pytest.skip("the package is not installed")
    arguments = yaml.safe_load("{rule: loss_backprop, options: {history: 30}, keep: 0.3}")
    algorithm = found["rule_backprop"].load()(**arguments)
    assert (algorithm.log_name, algorithm.keep, algorithm.rule.function.history) == ("loss_backprop", 0.3, 30)


def test_digits_are_a_fixed_stratified_split():
    (train_x, train_y), (test_x, test_y) = digits("train").tensors, digits("test").tensors
    assert train_x.shape == (1437, 1, 8, 8)
    assert test_x.shape == (360, 1, 8, 8)
    assert 0 <= train_x.min() < train_x.max() == 1
    assert test_y.bincount().min() >= 34
    together = torch.cat([train_x, test_x]).flatten(1)
    assert len(together) == len(train_y) + len(test_y) == 1797
    assert digits_cnn()((test_x[:3], test_y[:3])).shape == (3, 10)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        digits("valid")  # type: ignore[arg-type]


@pytest.mark.parametrize("launcher", [["python", "-m"], ["composer", "-n", "1", "-m"]])
def test_the_command_line(launcher, tmp_path):
    program = Path(sys.executable).with_name(launcher[0])
    overrides = [f"save_folder={tmp_path}/{{run_name}}", "max_duration=1ep", "progress_bar=false"]
    done = subprocess.run(
        [str(program), *launcher[1:], "composer_gradmatch.train", str(CONFIG), *overrides],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "samples forwarded             1,408" in done.stdout
    assert (tmp_path / "digits-gradmatch" / "config.yaml").exists()
