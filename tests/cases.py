"""One table of cases (a model and its data) that drives the step, microbatch, resume and DDP suites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from composer import Algorithm, Trainer
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from composer_gradmatch import select_first

NUM_CLASSES = 5


def _mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, NUM_CLASSES))


def _no_bias():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES, bias=False))


def _conv():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, NUM_CLASSES)
    )


def _batchnorm():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, NUM_CLASSES)
    )


def _any_size():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, NUM_CLASSES)
    )


class Reordered(nn.Module):
    """Defines its output layer first and an unused linear layer last."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, NUM_CLASSES)
        self.body = nn.Linear(12, 16)
        self.unused = nn.Linear(16, NUM_CLASSES)

    def forward(self, inputs):
        return self.head(torch.relu(self.body(inputs)))


class InPlace(nn.Module):
    """Changes its output layer's output in place."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, NUM_CLASSES)

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs))).mul_(0.5)


class Autocast(nn.Module):
    """A module that computes in bfloat16, as AMP does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.module(inputs)


class Encoder(nn.Module):
    """A classifier of sequences (M, T, width), worked on with samples or positions first."""

    def __init__(self, batch_first, *, width, heads, layers, dropout, num_classes=NUM_CLASSES):
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=dropout, batch_first=batch_first)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, inputs):
        hidden = self.body(inputs if self.batch_first else inputs.transpose(0, 1))
        return self.head(hidden.mean(1 if self.batch_first else 0))


@dataclass(frozen=True)
class Case:
    name: str
    module: Callable[[], nn.Module]
    layer: str
    shape: tuple[int, ...]

    def data(self, num_samples: int, seed: int = 0) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(num_samples, *self.shape, generator=generator)
        return TensorDataset(inputs, torch.randint(NUM_CLASSES, (num_samples,), generator=generator))

    def model(self, seed: int = 0) -> ComposerClassifier:
        torch.manual_seed(seed)
        return ComposerClassifier(self.module(), num_classes=NUM_CLASSES)


MLP = Case("mlp", _mlp, "2", (12,))
NO_BIAS = Case("no_bias", _no_bias, "2", (12,))
CONV = Case("conv", _conv, "4", (1, 4, 4))
BATCHNORM = Case("batchnorm", _batchnorm, "5", (1, 4, 4))
ANY_SIZE = Case("any_size", _any_size, "4", (1, 8, 8))
REORDERED = Case("reordered", Reordered, "head", (12,))
IN_PLACE = Case("in_place", InPlace, "head", (12,))
STEP_CASES = [MLP, NO_BIAS, CONV, REORDERED, IN_PLACE]


def loader(dataset: Dataset, batch_size: int, *, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
    return DataLoader(
        dataset, batch_size=batch_size, sampler=dist.get_sampler(dataset, shuffle=shuffle), drop_last=drop_last
    )


def make_trainer(model, train, algorithms, *, lr: float = 0.1, max_duration: str = "1ba", seed: int = 0, **kwargs):
    optimizers = kwargs.pop("optimizers", None) or torch.optim.SGD(model.parameters(), lr=lr)
    return Trainer(
        model=model,
        train_dataloader=train,
        algorithms=algorithms,
        optimizers=optimizers,
        max_duration=max_duration,
        seed=seed,
        progress_bar=False,
        **kwargs,
    )


#: Selects from all minibatches.
ON = {"start": 0.0, "end": 1.0, "interrupt": 0}


def fit(algorithms, model=None, data=None, batch_size=20, **kwargs):
    """Trains an MLP for a batch, unless something else is asked for, with selection first."""
    model = MLP.model() if model is None else model
    train = loader(MLP.data(60) if data is None else data, batch_size)
    trainer = make_trainer(model, train, algorithms, **{"algorithm_passes": [select_first], **kwargs})
    trainer.fit()
    return trainer


class On(Algorithm):
    """A user's algorithm: calls a function of the state on an event."""

    def __init__(self, event, function):
        self.event, self.function = event, function

    def match(self, event, state):
        return event == self.event

    def apply(self, event, state, logger):
        self.function(state)


class Counting:
    """A rule that remembers: it picks the next m samples at each call."""

    def __init__(self, *, offset: int = 0):
        self.offset, self.at = offset, offset

    def reset(self):
        self.at = self.offset

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def __call__(self, candidates, m):
        self.at += 1
        return (torch.arange(m) + self.at) % candidates.num_samples, None


def record_selections(algorithm):
    """The (batch before it, selection) of each step that an algorithm selects in, as they come."""
    seen = []
    original = algorithm.selector.select

    def select(state, num_samples, num_picks):
        batch = state.batch
        selection = original(state, num_samples, num_picks)
        seen.append((batch, selection))
        return selection

    algorithm.selector.select = select
    return seen
