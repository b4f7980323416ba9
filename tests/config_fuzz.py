"""Random changes of a config that runs, and what the command line makes of each."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import os
import random
import signal
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from composer import Trainer

from composer_gradmatch.train import main
from composer_gradmatch.train.registry import TABLES
from composer_gradmatch.train.schema import TRAINER_KEYS

GOOD: dict[str, Any] = {
    "run_name": "r",
    "seed": 1,
    "max_duration": "1ba",
    "global_train_batch_size": 16,
    "device_eval_batch_size": 360,
    "precision": "fp32",
    "model": {"name": "digits_cnn", "num_classes": 10, "width": 4},
    "train_loader": {
        "name": "digits",
        "dataset": {"split": "train"},
        "shuffle": True,
        "drop_last": True,
        "label_noise": {"fraction": 0.1, "seed": 0},
    },
    "eval_loader": {"name": "digits", "dataset": {"split": "test"}},
    "eval_subset_num_batches": 1,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "scheduler": {"name": "cosine", "alpha_f": 0.0},
    "algorithms": {"gradmatch": {"start": 0.0, "end": 1.0, "keep": 0.3, "interrupt": 0}},
    "callbacks": {"speed_monitor": {"window_size": 10}, "lr_monitor": {}},
    "loggers": {"in_memory": {}},
    "save_filename": "ep{epoch}-ba{batch}.pt",
    "save_folder": "runs/{run_name}",
    "progress_bar": False,
}
SECTIONS = {"algorithms": "algorithm", "callbacks": "callback", "loggers": "logger"}
#: Changes that take long, or change the process, by being right.
SPARED = {
    "deterministic_mode",
    "compile_config",
    "python_log_level",
    "dist_timeout",
    "num_workers",
    "parallelism_config",
}
# Loggers that reach for a network, and entries that warn, record or change the whole process.
SPARED_ENTRIES = {"mlflow", "slack", "neptune", "cometml", "wandb", "tensorboard", "file", "memory_snapshot"}

NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    0.5,
    -0.5,
    1.0,
    1e300,
    -1e300,
    1e-300,
    10**20,
    2**40,
    float("nan"),
    float("inf"),
    -float("inf"),
]
TIMES = ["1ep", "0ep", "-1ep", "1.5ep", "3ba", "0ba", "1dur", "0dur", "2dur", "0.5dur", "nandur", "infba", "1sec", "1h"]
TIMES += ["1iter", "5tok", "7sp", "ep"]
TEXTS = ["", " ", "\n", "a\0b", "foo", "{foo}", "{}", "{", "{epoch}", "{run_name}", "${x}", "???", "a/b", "/", ".."]
TEXTS += ["fp16", "null", "é"]
OTHERS = [
    None,
    True,
    False,
    [],
    [1],
    ["foo"],
    [[]],
    [None],
    {},
    {"x": 1},
    {"name": "foo"},
    {1: 2},
    [0.5, "1ep"],
    ["1ba"],
]


#: What entries need beside the argument that is changed.
NEEDED: dict[str, dict[str, Any]] = {
    "alibi": {"max_sequence_length": 8},
    "early_stopper": {"monitor": "MulticlassAccuracy", "dataloader_label": "eval"},
    "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
    "stochastic_depth": {"target_layer_name": "ResNetBottleneck"},
    "threshold_stopper": {"monitor": "MulticlassAccuracy", "dataloader_label": "eval", "threshold": 0.9},
    "decoupled_sgdw": {"lr": 0.1},
    "constant_with_warmup": {"t_warmup": "1ba"},
    "cosine_warm_restarts": {"t_0": "1ba"},
    "cosine_with_warmup": {"t_warmup": "1ba"},
    "exponential": {"gamma": 0.5},
    "linear_with_warmup": {"t_warmup": "1ba"},
    "multistep": {"milestones": ["1ba"]},
    "multistep_with_warmup": {"milestones": ["2ba"], "t_warmup": "1ba"},
    "polynomial": {"power": 2.0},
    "polynomial_with_warmup": {"t_warmup": "1ba"},
    "step": {"step_size": "1ba"},
}


class Change(NamedTuple):
    """A value at a dotted key, with what else is put beside it."""

    path: tuple[str, ...]
    value: Any
    beside: dict[str, Any]


class Outcome(NamedTuple):
    """What became of a config: the exit code, or None with what went wrong."""

    code: int | None
    said: str


def draw(rng: random.Random) -> Change:
    """A random change: of a value that is there, or of one that could be."""
    path, like, beside = rng.choice([_present, _trainers, _loaders, _named, _entry])(rng)
    pools = [NUMBERS, TIMES, TEXTS, OTHERS]
    if rng.random() < 0.75:
        if isinstance(like, bool):
            pools = [[True, False]]
        elif isinstance(like, int | float):
            pools = [NUMBERS]
        elif isinstance(like, str):
            pools = [TIMES, TEXTS]
    value = copy.deepcopy(rng.choice(rng.choice(pools)))
    # A run of very many epochs is no mistake that could be told, and does not end in time.
    return draw(rng) if path == ("max_duration",) and value == 2**40 else Change(path, value, beside)


Place = tuple[tuple[str, ...], Any, dict[str, Any]]


def _present(rng: random.Random) -> Place:
    path, at = (), GOOD
    while isinstance(at, dict) and at and (not path or rng.random() < 0.85):
        key = rng.choice(list(at))
        path, at = (*path, key), at[key]
    return path, at, {}


def _trainers(rng: random.Random) -> Place:
    key = rng.choice([key for key in TRAINER_KEYS if key not in SPARED])
    return (key,), inspect.signature(Trainer.__init__).parameters[key].default, {}


def _loaders(rng: random.Random) -> Place:
    switches = dict.fromkeys(("shuffle", "drop_last", "pin_memory", "persistent_workers"), True)
    options = {**switches, "prefetch_factor": 1, "timeout": 1}
    key = rng.choice(list(options))
    return (rng.choice(["train_loader", "eval_loader"]), key), options[key], {}


def _named(rng: random.Random) -> Place:
    """An argument of the model, of an optimizer or of a scheduler."""
    where = rng.choice(["model", "optimizer", "scheduler"])
    table = TABLES[where][0]
    name = GOOD["model"]["name"] if where == "model" else rng.choice(list(table))
    parameters = {k: p.default for k, p in inspect.signature(table[name]).parameters.items() if k != "params"}
    argument = rng.choice(list(parameters))
    return (where, argument), parameters[argument], {"name": name, **NEEDED.get(name, {})}


def _entry(rng: random.Random) -> Place:
    """An entry that the config may have, or an argument of it."""
    where = rng.choice([*SECTIONS, "algorithms"])
    table = TABLES[SECTIONS[where]][0]
    name = rng.choice([name for name in table if name not in SPARED_ENTRIES])
    parameters = inspect.signature(table[name]).parameters
    if not parameters or rng.random() < 0.15:
        return (where, name), {}, {}
    argument = rng.choice(list(parameters))
    return (where, name, argument), parameters[argument].default, NEEDED.get(name, {})


def changed(change: Change) -> dict[str, Any]:
    """The good config with a change."""
    config = copy.deepcopy(GOOD)
    if (
        change.path[0] == "algorithms"
        and change.path[1:2] != ("gradmatch",)
        and "backprop" in "".join(change.path[1:2])
    ):
        del config["algorithms"]["gradmatch"]  # Two would select from the same minibatches.
    at = config
    for key in change.path[:-1]:
        at = at.setdefault(key, {})
    if change.beside:
        at.clear()
        at.update(change.beside)
    at[change.path[-1]] = change.value
    return config


def run(config: dict[str, Any], folder: Path, seconds: int = 20) -> Outcome:
    """Runs a config by the command line, in a new folder; one that takes too long has no exit code."""
    folder.mkdir()
    here = os.getcwd()
    os.chdir(folder)
    Path("c.yaml").write_text(yaml.safe_dump(config))

    def give_up(*args: Any) -> None:
        raise TimeoutError("it did not end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        # A file of the system's, since the progress bar asks for its number.
        with (
            open("said", "w+") as said,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            code = main(["c.yaml"])
            said.seek(0)
            return Outcome(code, said.read())
    except Exception as error:
        return Outcome(None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.chdir(here)


def complaint(change: Change, outcome: Outcome) -> str | None:
    """What is wrong with an outcome: a traceback, no end, or a refusal that does not name the key."""
    if outcome.code == 0:
        return None
    if outcome.code != 2:
        return outcome.said
    # The entry, where it is one of several of its kind, or the section with the argument's name.
    nearer = change.path[1] if change.path[0] in SECTIONS and len(change.path) > 1 else change.path[0]
    names = {change.path[-1], nearer}
    refusal = outcome.said.partition("cannot be run:\n")[2]
    named = any(name in refusal for name in names)
    return None if named and "Traceback" not in refusal else f"does not name the key: {outcome.said}"
