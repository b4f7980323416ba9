"""For ``code_paths:`` of a config: an algorithm ``recorder`` that saves what each step began with and came to."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from composer.core import Algorithm, Event
from composer.utils import dist
from llmfoundry import registry

from composer_gradmatch.algorithms.subset_backprop import SubsetBackprop


class Recorder(Algorithm):
    """Listed last, it runs first on AFTER_DATALOADER: it sees the minibatch, not the picks."""

    def __init__(self, folder: str):
        self.folder, self.steps = Path(folder), []

    def match(self, event, state):
        return event in (Event.AFTER_DATALOADER, Event.AFTER_TRAIN_BATCH, Event.FIT_END)

    def apply(self, event, state, logger):
        module = getattr(state.model, "module", state.model).model
        if event is Event.AFTER_DATALOADER:
            weights = {name: value.clone() for name, value in module.state_dict().items()}
            self.before = {"kind": type(module), "config": module.config, "weights": weights}
            self.minibatch = copy.deepcopy(dict(state.batch))
        elif event is Event.AFTER_TRAIN_BATCH:
            (algorithm,) = [each for each in state.algorithms if isinstance(each, SubsetBackprop)]
            picks = algorithm.last_selection
            assert picks is not None, "trained whole"
            self.steps.append(
                {
                    **self.before,
                    "minibatch": self.minibatch,
                    "indices": picks.indices,
                    "sample_weights": picks.weights,
                    "gradients": {name: each.grad.clone() for name, each in module.named_parameters()},
                }
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.steps, self.folder / f"rank{dist.get_global_rank()}.pt")


registry.algorithms.register("recorder", func=Recorder)
