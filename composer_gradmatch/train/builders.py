"""From names in YAML to models, loaders, optimizers, schedulers, algorithms, callbacks and loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

import composer.algorithms as composer_algorithms
import composer.callbacks as composer_callbacks
import composer.loggers as composer_loggers
import composer.optim as composer_optim
import torch
from composer.core import Algorithm
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from composer_gradmatch import data, models
from composer_gradmatch.algorithms.gradmatch import GradMatch
from composer_gradmatch.algorithms.loss_backprop import LossBackprop
from composer_gradmatch.algorithms.random_backprop import RandomBackprop
from composer_gradmatch.train.config import ConfigError, argument_problems, matches, nearest, show_type
from composer_gradmatch.train.refusals import mark_as_users, refusing
from composer_gradmatch.train.value_rules import ARGUMENT_RULES, LOADER_RULES, Rule, number_problems, rule_problems

__all__ = [
    "TABLES",
    "build_algorithms",
    "build_entries",
    "build_loader",
    "build_named",
    "check_entries",
    "check_loader",
    "check_section",
    "resolve",
    "try_parts",
]

Factory = Callable[..., Any]

_ALGORITHMS: dict[str, Factory] = {
    "gradmatch": GradMatch,
    "random_backprop": RandomBackprop,
    "loss_backprop": LossBackprop,
    "alibi": composer_algorithms.Alibi,
    "augmix": composer_algorithms.AugMix,
    "blurpool": composer_algorithms.BlurPool,
    "channels_last": composer_algorithms.ChannelsLast,
    "colout": composer_algorithms.ColOut,
    "cutmix": composer_algorithms.CutMix,
    "cutout": composer_algorithms.CutOut,
    "ema": composer_algorithms.EMA,
    "factorize": composer_algorithms.Factorize,
    "gated_linear_units": composer_algorithms.GatedLinearUnits,
    "ghost_batchnorm": composer_algorithms.GhostBatchNorm,
    "gradient_clipping": composer_algorithms.GradientClipping,
    "gyro_dropout": composer_algorithms.GyroDropout,
    "label_smoothing": composer_algorithms.LabelSmoothing,
    "layer_freezing": composer_algorithms.LayerFreezing,
    "low_precision_groupnorm": composer_algorithms.LowPrecisionGroupNorm,
    "low_precision_layernorm": composer_algorithms.LowPrecisionLayerNorm,
    "mixup": composer_algorithms.MixUp,
    "no_op_model": composer_algorithms.NoOpModel,
    "progressive_resizing": composer_algorithms.ProgressiveResizing,
    "randaugment": composer_algorithms.RandAugment,
    "sam": composer_algorithms.SAM,
    "selective_backprop": composer_algorithms.SelectiveBackprop,
    "seq_length_warmup": composer_algorithms.SeqLengthWarmup,
    "squeeze_excite": composer_algorithms.SqueezeExcite,
    "stochastic_depth": composer_algorithms.StochasticDepth,
    "swa": composer_algorithms.SWA,
    "weight_standardization": composer_algorithms.WeightStandardization,
}

_CALLBACKS: dict[str, Factory] = {
    "activation_monitor": composer_callbacks.ActivationMonitor,
    "early_stopper": composer_callbacks.EarlyStopper,
    "free_outputs": composer_callbacks.FreeOutputs,
    "lr_monitor": composer_callbacks.LRMonitor,
    "memory_monitor": composer_callbacks.MemoryMonitor,
    "memory_snapshot": composer_callbacks.MemorySnapshot,
    "nan_monitor": composer_callbacks.NaNMonitor,
    "oom_observer": composer_callbacks.OOMObserver,
    "optimizer_monitor": composer_callbacks.OptimizerMonitor,
    "runtime_estimator": composer_callbacks.RuntimeEstimator,
    "speed_monitor": composer_callbacks.SpeedMonitor,
    "system_metrics_monitor": composer_callbacks.SystemMetricsMonitor,
    "threshold_stopper": composer_callbacks.ThresholdStopper,
}

_DATA: dict[str, Factory] = {
    "cifar10": data.cifar10,
    "cifar100": data.cifar100,
    "digits": data.digits,
    "imagenet32": data.imagenet32,
    "imdb": data.imdb,
    "imdb25k": data.imdb25k,
    "mnist5k": data.mnist5k,
    "svhn": data.svhn,
    "synthetic": data.synthetic,
}

_LOGGERS: dict[str, Factory] = {
    "cometml": composer_loggers.CometMLLogger,
    "file": composer_loggers.FileLogger,
    "in_memory": composer_loggers.InMemoryLogger,
    "mlflow": composer_loggers.MLFlowLogger,
    "neptune": composer_loggers.NeptuneLogger,
    "slack": composer_loggers.SlackLogger,
    "tensorboard": composer_loggers.TensorboardLogger,
    "wandb": composer_loggers.WandBLogger,
}

_MODELS: dict[str, Factory] = {
    "bert": models.bert,
    "digits_cnn": models.digits_cnn,
    "mnist_cnn": models.mnist_cnn,
    "resnet18_cifar": models.resnet18_cifar,
    "wide_resnet": models.wide_resnet,
}

_OPTIMIZERS: dict[str, Factory] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "decoupled_adamw": composer_optim.DecoupledAdamW,
    "decoupled_sgdw": composer_optim.DecoupledSGDW,
    "sgd": torch.optim.SGD,
}

_SCHEDULERS: dict[str, Factory] = {
    "constant": composer_optim.ConstantScheduler,
    "constant_with_warmup": composer_optim.ConstantWithWarmupScheduler,
    "cosine": composer_optim.CosineAnnealingScheduler,
    "cosine_warm_restarts": composer_optim.CosineAnnealingWarmRestartsScheduler,
    "cosine_with_warmup": composer_optim.CosineAnnealingWithWarmupScheduler,
    "exponential": composer_optim.ExponentialScheduler,
    "linear": composer_optim.LinearScheduler,
    "linear_with_warmup": composer_optim.LinearWithWarmupScheduler,
    "multistep": composer_optim.MultiStepScheduler,
    "multistep_with_warmup": composer_optim.MultiStepWithWarmupScheduler,
    "polynomial": composer_optim.PolynomialScheduler,
    "polynomial_with_warmup": composer_optim.PolynomialWithWarmupScheduler,
    "step": composer_optim.StepScheduler,
}

#: Kind of thing → (its names, the group of entry points that adds to them).
TABLES: dict[str, tuple[dict[str, Factory], str | None]] = {
    "algorithm": (_ALGORITHMS, "llmfoundry_algorithms"),
    "callback": (_CALLBACKS, "llmfoundry_callbacks"),
    "data set": (_DATA, "composer_gradmatch_data"),
    "logger": (_LOGGERS, "llmfoundry_loggers"),
    "model": (_MODELS, "composer_gradmatch_models"),
    "optimizer": (_OPTIMIZERS, None),
    "scheduler": (_SCHEDULERS, None),
}

_LOADER_TYPES = {
    "shuffle": bool,
    "drop_last": bool,
    "num_workers": int,
    "pin_memory": bool,
    "prefetch_factor": int | None,
    "persistent_workers": bool,
    "timeout": float,
    "label_noise": dict | None,
}


def resolve(kind: str, name: str) -> Factory:
    """The factory that a name stands for: of our tables, else of an installed package's entry points.

    Args:
        kind (str): A key of :data:`TABLES`.
        name (str): The name in YAML.

    Raises:
        ConfigError: If nothing has that name.
    """
    table, group = TABLES[kind]
    if name in table:
        return table[name]
    added = {point.name: point for point in entry_points(group=group)} if group else {}
    if name in added:
        factory = added[name].load()
        mark_as_users(factory.__module__)
        return factory
    raise ConfigError(f"unknown {kind} {name!r}; {nearest(name, [*table, *added])}")


def _check_named(
    kind: str, name: str, arguments: dict[str, Any] | None, name_at: str, at: str, supplied: tuple[str, ...] = ()
) -> list[str]:
    """What is wrong with a name, found at ``name_at``, and its arguments (None: not looked at), found at ``at``."""
    try:
        factory = resolve(kind, name)
    except ConfigError as error:
        return [f"{name_at}: {error}"]
    if arguments is None:
        return []
    problems = argument_problems(at, factory, arguments, supplied)
    if factory is TABLES[kind][0].get(name):  # The rules are for what our tables hold, not for what others bring.
        problems += _ruled(at, arguments, ARGUMENT_RULES.get(kind, {}), problems, name)
    return problems


def _ruled(at: str, values: dict[str, Any], rules: dict[str, Rule], known: list[str], name: str = "") -> list[str]:
    """What breaks the rules among the values of a section that have no problem yet."""
    wrong = {problem.split(":", 1)[0] for problem in known}
    finite = {key: value for key, value in values.items() if not number_problems(f"{at}.{key}", value)}
    fitting = {key: value for key, value in finite.items() if f"{at}.{key}" not in wrong}
    return rule_problems(at, fitting, rules, name)


def _without_name(kind: str, where: str, section: Any) -> list[str]:
    if isinstance(section, dict) and isinstance(section.get("name"), str):
        return []
    return [f"{where}: expected a mapping with a name, got {section!r}. {nearest('', TABLES[kind][0])}"]


def check_section(kind: str, where: str, section: Any, supplied: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with a section ``{name: ..., arguments ...}``: a message for each problem."""
    if problems := _without_name(kind, where, section):
        return problems
    arguments = {key: value for key, value in section.items() if key != "name"}
    return _check_named(kind, section["name"], arguments, f"{where}.name", where, supplied)


def check_loader(where: str, section: Any) -> list[str]:
    """What is wrong with a loader's section: a message for each problem."""
    problems = _without_name("data set", where, section)
    if not isinstance(section, dict):
        return problems
    dataset = section.get("dataset")
    if dataset is None:
        dataset = {}
    if not isinstance(dataset, dict):
        return [f"{where}.dataset: expected a mapping, got {dataset!r}."]
    if not problems:
        problems = _check_named("data set", section["name"], dataset, f"{where}.name", f"{where}.dataset")
    for key, value in section.items():
        if key in ("name", "dataset"):
            continue
        if key not in _LOADER_TYPES:
            problems.append(f"{where}.{key}: unknown key; {nearest(key, ['name', 'dataset', *_LOADER_TYPES])}")
        elif not matches(value, _LOADER_TYPES[key]):
            problems.append(f"{where}.{key}: expected {show_type(_LOADER_TYPES[key])}, got {value!r}.")
        elif key == "label_noise" and value is not None:
            problems += argument_problems(f"{where}.label_noise", data.NoisyLabels, value, supplied=("dataset",))
    problems += _ruled(where, section, LOADER_RULES, problems)
    if not problems and not section.get("num_workers"):
        problems = [
            f"{where}.{key}: expected num_workers of at least 1 beside it; got {section[key]!r} without workers."
            for key in ("persistent_workers", "prefetch_factor", "timeout")
            if section.get(key) and not number_problems(key, section[key])
        ]
    return problems


def check_entries(kind: str, where: str, entries: Any) -> list[str]:
    """What is wrong with a section of ``name: {arguments}`` entries: a message for each problem."""
    if entries is None or entries is False:
        return []
    if not isinstance(entries, dict):
        return [f"{where}: expected a mapping of names to arguments, got {entries!r}."]
    problems = []
    for name, arguments in entries.items():
        at = f"{where}.{name}"
        if not (arguments is None or arguments is False or isinstance(arguments, dict)):
            problems.append(f"{at}: expected a mapping of arguments, nothing or false, got {arguments!r}.")
        else:
            problems += _check_named(kind, str(name), None if arguments is False else arguments or {}, at, at)
    return problems


def build_named(kind: str, section: dict[str, Any], *args: Any) -> Any:
    """Builds what a checked section ``{name: ..., arguments ...}`` describes.

    Raises:
        ConfigError: If what it names needs a package or a file that is not there, or refuses a value.
    """
    with _refusing(f"{kind} {section['name']}"):
        return resolve(kind, section["name"])(*args, **{k: v for k, v in section.items() if k != "name"})


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turns what a constructor raises into an error of the config.

    These are the errors that a constructor refuses values with, whoever wrote it; of others, those that the user's own
    code had no part in.
    """
    with refusing(where):
        try:
            yield
        except ConfigError:
            raise
        except (OSError, ImportError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error


def build_entries(kind: str, entries: dict[str, Any] | None) -> list[Any]:
    """Builds the entries that are not switched off by ``false``.

    Raises:
        ConfigError: If one needs a package or a file that is not there, or refuses a value; it names the entry.
    """
    built = []
    for name, arguments in (entries or {}).items():
        if arguments is not False:
            with _refusing(f"{kind}s.{name}"):
                built.append(resolve(kind, name)(**(arguments or {})))
    return built


def build_algorithms(entries: dict[str, Any] | None) -> list[Algorithm]:
    """Builds the algorithms, turning an argument's value that is refused into an error that names the entry.

    Raises:
        ConfigError: If an algorithm refuses a value.
    """
    return build_entries("algorithm", entries)


def try_parts(config: dict[str, Any]) -> None:
    """Builds what costs nothing to build, so that a value that it refuses is told of before data and model are built.

    Args:
        config (dict[str, Any]): Checked.

    Raises:
        ConfigError: If a callback, the scheduler or the optimizer refuses a value.
    """
    build_entries("callback", config.get("callbacks"))
    build_named("optimizer", config["optimizer"], [torch.nn.Parameter(torch.zeros(1))])
    if config.get("scheduler"):
        build_named("scheduler", config["scheduler"])


def build_loader(section: dict[str, Any], batch_size: int, where: str) -> DataLoader:
    """Builds a data loader over a data set, with Composer's distributed sampler.

    Args:
        section (dict[str, Any]): Checked: name, dataset, shuffle, drop_last, label_noise (the arguments of
            :class:`.NoisyLabels`) and the loader's own arguments.
        batch_size (int): Samples a batch on this rank.
        where (str): The section's key, for the error message.

    Raises:
        ConfigError: If the data cannot be loaded, or there would be no batch.
    """
    options = {key: value for key, value in section.items() if key not in ("name", "dataset", "label_noise")}
    shuffle, drop_last = options.pop("shuffle", False), options.pop("drop_last", False)
    with _refusing(where):
        dataset: Dataset = resolve("data set", section["name"])(**(section.get("dataset") or {}))
        if section.get("label_noise") is not None:
            dataset = data.NoisyLabels(dataset, **section["label_noise"])
        sampler = dist.get_sampler(dataset, shuffle=shuffle, drop_last=drop_last)
        loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last, **options)
    if not len(loader):
        raise ConfigError(
            f"{where}: {len(sampler)} samples on each rank give no batch of {batch_size} with drop_last=true. Lower "
            "the batch size or set drop_last=false."
        )
    return loader
