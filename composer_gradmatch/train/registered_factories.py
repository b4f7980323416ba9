"""What users register, as what YAML's sections are checked and built by: factories that look at what comes out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.models import ComposerClassifier, ComposerModel
from torch import nn

from composer_gradmatch.registered import Registered, registered
from composer_gradmatch.train.config import ConfigError, hints_of, nearest

__all__ = ["data_factory", "loss_named", "model_factory", "takes_loss", "with_loss"]

#: What ComposerClassifier is given beside a module; keys of YAML's ``model:``, where they are not the function's own.
_OF_CLASSIFIER = {"num_classes": int | None, "loss_fn": str | None}


def model_factory(added: Registered) -> Callable[..., ComposerModel]:
    """Makes the factory of a model: what is a module only is made a ComposerClassifier of ``num_classes``.

    Args:
        added (Registered): A function, or class.

    Returns:
        Callable: With the function's parameters, and with ``num_classes`` and ``loss_fn`` where it has none.
    """
    function, own = added.function, added.signature.parameters
    more = [name for name in _OF_CLASSIFIER if name not in own]

    @functools.wraps(function, updated=())
    def make(**arguments: Any) -> ComposerModel:
        model = function(**{key: value for key, value in arguments.items() if key not in more})
        ours = [key for key in more if arguments.get(key) is not None]
        if isinstance(model, ComposerModel):
            if ours:
                raise ConfigError(
                    f"{added.where}: {function.__name__} returns a ComposerModel, which has its own loss and metrics; "
                    f"{ours[0]} is for a plain module. Leave it out."
                )
            return model
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"{added.where}: {function.__name__} returned {_described(model)}; expected a torch module or a "
                "ComposerModel."
            )
        num_classes, loss = arguments.get("num_classes"), arguments.get("loss_fn") if "loss_fn" in more else None
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ConfigError(
                f"{added.where}: {function.__name__} returned a module, a {type(model).__name__}. Give "
                "model.num_classes, at least 2, for a ComposerClassifier with cross-entropy to be made of it; or "
                "return a ComposerModel."
            )
        if loss is None:
            return ComposerClassifier(model, num_classes=num_classes)
        return _ClassifierWithLoss(model, num_classes, loss_named(loss))

    added_parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_OF_CLASSIFIER[name])
        for name in more
    ]
    keywords = [each for each in own.values() if each.kind is each.VAR_KEYWORD]
    named = [each for each in own.values() if each.kind is not each.VAR_KEYWORD]
    make.__annotations__ = {**hints_of(function), **{name: _OF_CLASSIFIER[name] for name in more}}
    vars(make)["__signature__"] = inspect.Signature([*named, *added_parameters, *keywords])
    vars(make)["takes_loss"] = "loss_fn" in more
    return make


class _ClassifierWithLoss(ComposerClassifier):
    """A module whose loss is the mean of a registered one."""

    def __init__(self, module: nn.Module, num_classes: int, losses: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__(module, num_classes=num_classes)
        self.losses = losses

    def loss(self, outputs: Any, batch: Any, reduction: str = "mean") -> torch.Tensor:
        losses = self.losses(outputs, batch)
        return losses if reduction == "none" else losses.mean()


def data_factory(added: Registered) -> Callable[..., Any]:
    """Makes the factory of a data set, which checks that it is one.

    Args:
        added (Registered): A function, or class.
    """
    function = added.function

    @functools.wraps(function, updated=())
    def make(*args: Any, **arguments: Any) -> Any:
        data = function(*args, **arguments)
        known = not isinstance(data, str | bytes | Mapping | tuple | torch.Tensor | torch.utils.data.DataLoader)
        if not (known and hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ConfigError(
                f"{added.where}: {function.__name__} returned {_described(data)}; expected a data set with a length "
                "and samples by number (a torch Dataset with __len__ and __getitem__): the loader is made of it."
            )
        return data

    make.__annotations__ = hints_of(function)
    return make


def _described(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def loss_named(name: str) -> Callable[[Any, Any], torch.Tensor]:
    """Finds a registered loss.

    Raises:
        ConfigError: If there is none of that name.
    """
    losses = registered("loss")
    if name not in losses:
        hint = nearest(name, losses) if losses else "None is registered: see --register."
        raise ConfigError(f"unknown loss {name!r}; {hint}")
    return losses[name].function


def takes_loss(kind: str, factory: Callable[..., Any]) -> bool:
    """Tells whether a section's ``loss_fn`` is the name of a registered loss: of algorithms, and of plain modules."""
    if kind == "algorithm":
        return "loss_fn" in inspect.signature(factory).parameters
    return bool(getattr(factory, "takes_loss", False))


def with_loss(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Gives an algorithm's arguments with the loss itself in the place of its name.

    Raises:
        ConfigError: If there is none of that name.
    """
    name = arguments.get("loss_fn")
    return {**arguments, "loss_fn": loss_named(name)} if kind == "algorithm" and isinstance(name, str) else arguments
