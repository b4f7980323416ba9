"""Names in YAML → what they stand for: tables of factories, and the entry points and users' files that add to them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import composer.algorithms as composer_algorithms
import composer.callbacks as composer_callbacks
import composer.loggers as composer_loggers
import composer.optim as composer_optim
import torch

from composer_gradmatch.algorithms.factory import algorithm_of
from composer_gradmatch.algorithms.gradmatch import GradMatch
from composer_gradmatch.algorithms.importance_backprop import ImportanceBackprop
from composer_gradmatch.algorithms.loss_backprop import LossBackprop
from composer_gradmatch.algorithms.random_backprop import RandomBackprop
from composer_gradmatch.algorithms.selection_images import SelectionImages
from composer_gradmatch.algorithms.selection_log import SelectionLog
from composer_gradmatch.data.table import DATA_SETS
from composer_gradmatch.models.table import MODELS
from composer_gradmatch.registered import registered
from composer_gradmatch.rules.table import GROUP, RULES, rule_named, rule_names
from composer_gradmatch.train.config import ConfigError, nearest
from composer_gradmatch.train.refusals import mark_as_users
from composer_gradmatch.train.registered_factories import data_factory, model_factory

__all__ = ["TABLES", "Factory", "clashes", "names_of", "resolve"]

Factory = Callable[..., Any]

_ALGORITHMS: dict[str, Factory] = {
    "gradmatch": GradMatch,
    "random_backprop": RandomBackprop,
    "loss_backprop": LossBackprop,
    "importance_backprop": ImportanceBackprop,
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
    "selection_images": SelectionImages,
    "selection_log": SelectionLog,
    "speed_monitor": composer_callbacks.SpeedMonitor,
    "system_metrics_monitor": composer_callbacks.SystemMetricsMonitor,
    "threshold_stopper": composer_callbacks.ThresholdStopper,
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
    "data set": (DATA_SETS, "composer_gradmatch_data"),
    "logger": (_LOGGERS, "llmfoundry_loggers"),
    "model": (MODELS, "composer_gradmatch_models"),
    "optimizer": (_OPTIMIZERS, None),
    "scheduler": (_SCHEDULERS, None),
}


#: Kind of thing that users register → what makes a factory of it; a rule's is that of an algorithm.
_ADDED: dict[str, Callable[..., Factory]] = {"data set": data_factory, "model": model_factory}


def names_of(kind: str) -> set[str]:
    """Lists the names of a kind, of our tables and users' files; of other packages', only those of rules."""
    added = registered(kind) if kind in _ADDED else {}
    return {*TABLES[kind][0], *added, *(rule_names() if kind == "algorithm" else [])}


def clashes() -> list[str]:
    """Tells which names that users have registered are those of something else: a message for each."""
    problems = []
    for kind in (*_ADDED, "rule"):
        table, group = (_ALGORITHMS | RULES, GROUP) if kind == "rule" else TABLES[kind]
        installed = {point.name for point in entry_points(group=group)} if group else set()
        for name, each in registered(kind).items():
            if name in table or name in installed:
                owner = "this package or Composer" if name in table else "an installed package"
                problems.append(f"{each.where}: {name!r} is a name of {owner} already. Give the {kind} another one.")
    return problems


def resolve(kind: str, name: str) -> Factory:
    """Finds the factory that a name stands for: of our tables, of users' files, or of an installed package.

    A rule's name is that of an algorithm, whether the rule is one of ours or of another package.

    Args:
        kind (str): A key of :data:`TABLES`.
        name (str): The name in YAML.

    Raises:
        ConfigError: If nothing has that name, or a rule of that name is none.
    """
    table, group = TABLES[kind]
    if name in table:
        return table[name]
    if kind in _ADDED and name in registered(kind):
        return _ADDED[kind](registered(kind)[name])
    added = {point.name: point for point in entry_points(group=group)} if group else {}
    if name in added:
        factory = added[name].load()
        mark_as_users(factory.__module__)
        return factory
    if kind == "algorithm" and name in rule_names():
        return _rules_algorithm(name)
    raise ConfigError(f"unknown {kind} {name!r}; {nearest(name, {*names_of(kind), *added})}")


def _rules_algorithm(name: str) -> Factory:
    try:
        factory = algorithm_of(rule_named(name))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the rule {name!r} is none: {error}") from error
    mark_as_users(factory.__module__)
    return factory
