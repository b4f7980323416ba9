"""Values of a config that cannot work: exit code 2 and a line with the key, and where the user's own code begins."""

from __future__ import annotations

import pytest
import torch
import yaml
from composer.algorithms import LabelSmoothing
from composer.core import Callback
from composer.models import ComposerClassifier
from config_fuzz import GOOD, Change, changed, run
from torch import nn
from torch.utils.data import Dataset

from composer_gradmatch import GradMatch
from composer_gradmatch.train import main, train
from composer_gradmatch.train.config import ConfigError, load_config, matches, parse_time
from composer_gradmatch.train.refusals import frames_of, touches_users_code
from composer_gradmatch.train.registry import TABLES
from composer_gradmatch.train.schema import check_config
from composer_gradmatch.train.section_checks import check_entries
from composer_gradmatch.train.value_rules import overwriting_problem

BAD = [
    *(
        (("max_duration",), value)
        for value in ("abc", "10ba ", "1.5ep", "0ep", "-5ep", "1", "1dur", "1iter", "infep", 0)
    ),
    *((("max_duration",), value) for value in ("nanba", "5tok", "1h", [1], True, -3)),
    *((("precision",), value) for value in ("foo", "amp_bf16", "amp_fp16")),
    *((("device",), value) for value in ("foo", "mps", "tpu", "", 0)),
    *((("seed",), value) for value in (-1, 2**32, 1.0, float("nan"))),
    *((("save_interval",), value) for value in ("foo", "-1ep", "2dur", "0dur", "1iter", -1, "5tok")),
    *((("eval_interval",), value) for value in ("foo", "-1ep", "0dur", [1], "5tok")),
    *((("device_train_microbatch_size",), value) for value in (0, -1, 0.5, 4.0, "auto", "foo", float("nan"))),
    *((("scale_schedule_ratio",), value) for value in (0, -1, float("inf"), 1e-9, 1e300)),
    *((("train_subset_num_batches",), value) for value in (0, -2)),
    *((("eval_subset_num_batches",), value) for value in (0, -2)),
    *((("global_train_batch_size",), value) for value in (0, -1, 10**20, 2**40)),
    *((("ddp_sync_strategy",), value) for value in ("foo", 1)),
    *((("python_log_level",), value) for value in ("foo", "")),
    *((("load_path",), value) for value in ("nope.pt", "", "{rank}.pt")),
    *((("compile_config",), value) for value in ({"mode": "foo"}, {"foo": 1}, {"options": {"foo": 1}}, [])),
    *((("dist_timeout",), value) for value in (0, -1, 1e300)),
    *(
        (("save_filename",), value)
        for value in (
            "",
            "{foo}.pt",
            "{",
            "a/",
            "constant.pt",
            "{rank}.pt",
            "{batch:04d}.pt",
            "{total_wct}.pt",
            "{batch}-{batch}.pt",
            "a({batch}.pt",
            "{batch}{{x}}.pt",
            "a\0{batch}",
        )
    ),
    *((("parallelism_config",), value) for value in ({"fsdp": {}}, {"foo": 1}, [])),
    (("precision_config",), {"foo": 1}),
    (("load_path",), "c.yaml"),
    (("callbacks", "early_stopper"), {"monitor": "MulticlassAccuracy", "dataloader_label": "foo"}),
    *((("save_folder",), value) for value in ("s3://a/b", "a" * 300, "/proc/x", "c.yaml", "", "{foo}", "a\0b", 0)),
    *((("run_name",), value) for value in ("", "  ", "{foo}", "a\0b")),
    *((("save_num_checkpoints_to_keep",), value) for value in (-2, 1.5)),
    *((("train_loader", "num_workers"), value) for value in (-1, 100_000, 10**20)),
    *((("train_loader", "prefetch_factor"), value) for value in (0, -1, 2)),
    *((("eval_loader", "timeout"), value) for value in (-1, 5, float("nan"))),
    *((("train_loader", "label_noise"), value) for value in ({"fraction": 0.1}, {"fraction": 2.0, "seed": 0}, 0, [])),
    *((("train_loader", "dataset"), value) for value in (0, "", [], False)),
    (("train_loader", "persistent_workers"), True),
    *((("optimizer", "lr"), value) for value in (float("nan"), float("inf"), -0.1, 1e300, "fast")),
    *((("optimizer", "momentum"), value) for value in (-1, float("nan"))),
    (("scheduler", "t_max"), "foo"),
    *((("scheduler", "alpha_f"), value) for value in (-0.1, float("nan"))),
    *((("scheduler",), value) for value in (0, "", [], {})),
    *((("eval_loader",), value) for value in (0, "", [], {})),
    *((("algorithms", "gradmatch"), value) for value in (0, 0.0, "", [], True, "foo")),
    *((("algorithms",), value) for value in (0, "", [], True)),
    (("algorithms", "gradmatch", "output_layer"), "foo"),
    (("algorithms", "cutmix"), {"alpha": -1.0}),
    (("algorithms", "gradient_clipping"), {"clipping_type": "foo", "clipping_threshold": 1.0}),
    (("algorithms", "randaugment"), {}),
    *((("callbacks", "speed_monitor", "window_size"), value) for value in (0, -1)),
    (("callbacks", "runtime_estimator"), {"time_unit": "foo"}),
    (("callbacks", "nan_monitor"), {"foo": 1}),
    (("callbacks", "early_stopper"), {"monitor": "x", "dataloader_label": "train", "patience": "foo"}),
    (("loggers", "file"), {"filename": "{foo}.txt"}),
    *((("model", "num_classes"), value) for value in (-1, 1, 5, 9, 10**20)),
    (("model", "width"), 0),
    (("model", "name"), "resnet18_cifar"),
]


@pytest.mark.parametrize(("path", "value"), BAD, ids=lambda each: str(each)[:60])
def test_a_bad_value_is_one_message_with_its_key(path, value, tmp_path):
    config = changed(Change(path, value, {}))
    if path == ("model", "name"):
        config["model"] = {"name": value}
    code, said = run(config, tmp_path / "run")
    assert code == 2, said
    refusal = said.partition("cannot be run:\n")[2]
    assert refusal.startswith((".".join(path), path[0])), refusal
    assert len(refusal.splitlines()) == 1
    assert not list((tmp_path / "run").rglob("config.yaml"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_duration",), "1ba"),
        (("max_duration",), "16sp"),
        (("eval_interval",), 0),
        (("save_interval",), "0.5dur"),
        (("save_interval",), "0ba"),
        (("save_filename",), "ep{epoch}-{run_name}-{batch}-of-{world_size}.pt"),
        (("device_train_microbatch_size",), 4),
        (("optimizer", "lr"), 0),
        (("algorithms", "gradmatch"), False),
        (("algorithms", "gradmatch"), None),
        (("algorithms", "label_smoothing"), {}),
        (("algorithms",), None),
        (("algorithms",), False),
        (("scheduler",), None),
        (("scheduler",), False),
        (("eval_loader",), None),
        (("eval_loader",), False),
        (("model", "num_classes"), 11),
        (("device",), "CPU"),
        (("precision",), "FP32"),
    ],
    ids=str,
)
def test_a_good_value_runs(path, value, tmp_path):
    assert run(changed(Change(path, value, {})), tmp_path / "run") == (0, "")


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "5\n", "foo", "x: " + "[" * 400 + "]" * 400, "a: [1", "a: ${b}", "a: ???"]
)
def test_a_file_that_is_no_config(text, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert main([str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_override_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    with pytest.raises(ConfigError, match=r"^algorithms: cannot override it with 'algorithms=\[\]'"):
        load_config(path, ["seed=3", "algorithms=[]"])
    assert load_config(path, ["seed=3", "seed=4"])["seed"] == 4


@pytest.mark.parametrize(
    ("name", "interval", "differs"),
    [
        ("ep{epoch}.pt", "1ep", True),
        ("ep{epoch}.pt", 2, True),
        ("ep{epoch}.pt", "10ba", False),
        ("ba{batch}.pt", "10ba", True),
        ("ba{batch}.pt", "1ep", True),
        ("{batch_in_epoch}.pt", "1ep", False),
        ("{batch_in_epoch}.pt", "10ba", False),
        ("ep{epoch}-{batch_in_epoch}.pt", "10ba", True),
        ("{sample}.pt", "0.1dur", True),
        ("last-{rank}.pt", "1ep", False),
    ],
)
def test_names_of_checkpoints_that_overwrite_each_other(name, interval, differs):
    assert (overwriting_problem(name, interval) is None) == differs


def test_a_name_may_overwrite_itself_where_that_is_asked_for():
    config = {**GOOD, "save_filename": "last.pt"}
    with pytest.raises(ConfigError, match="save_filename: expected a name that differs"):
        check_config(config)
    with pytest.raises(ConfigError, match="save_filename"):
        check_config({**config, "save_overwrite": True, "save_num_checkpoints_to_keep": 1})
    check_config({**config, "save_overwrite": True})


@pytest.mark.parametrize("value", [0, 0.0, "", [], True, "foo", 1])
@pytest.mark.parametrize(("kind", "name"), [("algorithm", "gradmatch"), ("callback", "lr_monitor"), ("logger", "file")])
def test_only_a_mapping_nothing_or_false_is_an_entry(kind, name, value):
    (problem,) = check_entries(kind, f"{kind}s", {name: value})
    assert problem.startswith(f"{kind}s.{name}: expected a mapping")


def test_times_and_enums_are_read_where_strings_stand_for_them():
    assert parse_time("10ep") is not None
    assert [parse_time(text) for text in ("ep", "-1ba", "infep", "nandur", "1.5ep", "")] == [None] * 6
    from composer.core import Precision, Time

    assert matches("3ba", str | Time | int)
    assert not matches("foo", str | Time | int)
    assert matches("FP32", str | Precision)
    assert not matches("fp33", str | Precision)


class Broken(ComposerClassifier):
    """A user's model that fails in the step it is told to."""

    def __init__(self, fails_at: int, error: type[BaseException]) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), num_classes=10)
        self.steps, self.fails_at, self.error = 0, fails_at, error

    def forward(self, batch):
        self.steps += 1
        if self.steps > self.fails_at:
            raise self.error("the user's bug")
        return super().forward(batch)


def with_broken(monkeypatch, tmp_path, fails_at, error):
    monkeypatch.setitem(TABLES["model"][0], "broken", lambda: Broken(fails_at, error))
    sections = {"model": {"name": "broken"}, "algorithms": None, "save_folder": str(tmp_path), "max_duration": "3ba"}
    return {**GOOD, **sections}


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize(
    "error", [RuntimeError, ValueError, KeyError, FileNotFoundError, KeyboardInterrupt, SystemExit]
)
def test_a_bug_in_the_users_model_is_a_traceback(error, fails_at, tmp_path, monkeypatch):
    with pytest.raises(error, match="the user's bug") as caught:
        train(with_broken(monkeypatch, tmp_path, fails_at, error))
    assert not isinstance(caught.value, ConfigError)


def test_a_bug_of_a_library_is_a_traceback_after_the_first_batch_and_a_refusal_on_it(tmp_path, monkeypatch):
    apply = LabelSmoothing.apply
    # Compiled as the library's own, so that no frame is the user's.
    code = compile("def fail(self, *args):\n    raise RuntimeError('a bug')\n", "<generated>", "exec")
    names = {"__name__": LabelSmoothing.__module__}
    exec(code, names)
    config = {**GOOD, "save_folder": str(tmp_path), "max_duration": "3ba", "algorithms": {"label_smoothing": {}}}
    monkeypatch.setattr(LabelSmoothing, "apply", names["fail"])
    with pytest.raises(ConfigError, match=r"^algorithms.label_smoothing: the run failed on its first batch: .* a bug"):
        train(config)
    names["apply"] = apply
    later = "def late(self, event, state, logger):\n    return (fail if state.timestamp.batch > 0 else apply)"
    exec(compile(later + "(self, event, state, logger)\n", "<generated>", "exec"), names)
    monkeypatch.setattr(LabelSmoothing, "apply", names["late"])
    with pytest.raises(RuntimeError, match="a bug") as caught:
        train(config)
    assert not isinstance(caught.value, ConfigError)


class BrokenData(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        raise RuntimeError("the user's bug")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_in_the_users_data_is_a_traceback(num_workers, tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES["data set"][0], "broken", BrokenData)
    monkeypatch.setitem(TABLES["model"][0], "own", lambda: Broken(99, RuntimeError))
    loader = {"name": "broken", "num_workers": num_workers}
    config = {**GOOD, "model": {"name": "own"}, "train_loader": loader, "save_folder": str(tmp_path)}
    with pytest.raises(RuntimeError, match="the user's bug") as caught:
        train(config)
    assert not isinstance(caught.value, ConfigError)


class BrokenCallback(Callback):
    def fit_start(self, state, logger):
        raise RuntimeError("the user's bug")


def test_a_bug_in_the_users_callback_is_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES["callback"][0], "broken", BrokenCallback)
    with pytest.raises(RuntimeError, match=r"^the user's bug"):
        train({**GOOD, "callbacks": {"broken": {}}, "save_folder": str(tmp_path)})


def test_whose_code_an_exception_has_touched():
    with pytest.raises(IndexError) as caught:
        torch.nn.functional.softmax(torch.zeros(2), dim=7)
    error = caught.value
    assert touches_users_code(error)  # This test's frame is the user's.
    error.__traceback__ = error.__traceback__.tb_next
    assert frames_of(error)
    assert not touches_users_code(error)


def test_this_package_is_not_the_users_code():
    with pytest.raises(ValueError, match="keep") as caught:
        GradMatch(keep=7)
    error = caught.value
    error.__traceback__ = error.__traceback__.tb_next
    assert frames_of(error)
    assert not touches_users_code(error)


def test_a_refused_first_batch_leaves_the_folder_free(tmp_path):
    config = {**GOOD, "save_folder": str(tmp_path / "r"), "algorithms": {"randaugment": {}}}
    with pytest.raises(ConfigError, match=r"algorithms\.randaugment"):
        train(config)
    train({**config, "algorithms": None})


@pytest.mark.parametrize("folder", ["file/runs", "file"])
def test_a_folder_that_cannot_be_made(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^save_folder: cannot make the folder"):
        train({**GOOD, "save_folder": str(tmp_path / folder)})


def test_the_check_of_samples_leaves_model_and_random_numbers_alone(tmp_path):
    from composer_gradmatch.train.builders import build_loader, build_named
    from composer_gradmatch.train.setting_up import check_samples

    torch.manual_seed(0)
    model, loader = build_named("model", GOOD["model"]), build_loader(GOOD["train_loader"], 8, "train_loader")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    check_samples(GOOD, model, loader, None)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
