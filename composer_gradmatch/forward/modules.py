"""The modules of a model, for what looks at them in each step."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

__all__ = ["has_module_of", "modules_of"]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Tells what ``model.modules()`` goes over, without the names that it makes on its way."""
    found, seen = [model], {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def has_module_of(modules: Iterable[nn.Module], kinds: tuple[type, ...]) -> bool:
    """Tells whether one of some modules is of one of some kinds."""
    return any(issubclass(kind, kinds) for kind in set(map(type, modules)))
