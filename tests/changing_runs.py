"""Runs of one forward pass a step in which something changes, for the tests of them."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.nn.functional as F
from cases import record_selections
from composer import Callback, DataSpec, Trainer
from composer.models import ComposerModel
from torch import nn

from composer_gradmatch import GradMatch, select_first

M, KEEP = 16, 0.5


def tuples(x, y):
    return x, y


def lists(x, y):
    return [x, y]


def dicts(x, y):
    return {"x": x, "y": y}


class Net(ComposerModel):
    """A model that reads a batch of any kind; layers of a kind that changes are the subclasses'."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(12, 16), nn.Identity(), nn.Linear(16, 5)
        self.register_buffer("offset", torch.zeros(16))
        self.scale = 1.0

    def items(self, batch):
        return (batch["x"], batch["y"]) if isinstance(batch, dict) else batch

    def hidden(self, x):
        return self.a(x) + self.offset

    def forward(self, batch):
        return self.head(torch.tanh(self.norm(self.hidden(self.items(batch)[0])) * self.scale))

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, self.items(batch)[1], reduction=reduction)


class AgainstOwn(Callback):
    """Compares each step's gradient with autograd's own, of the picks, by a copy of the model as it is.

    The reference is made when the Trainer has just split its batch, so after all that changes the model before.
    """

    def __init__(self, selections, kind):
        self.selections, self.kind = selections, kind
        self.errors, self.gradients = [], []

    def batch_start(self, state, logger):
        self.batch = state.batch
        state.model.zero_grad()  # Of what the optimizer does not know, too.

    def before_train_batch(self, state, logger):
        own = copy.deepcopy(state.model)
        weights = self.selections[-1][1].weights
        losses = own.loss(own(self.batch), self.batch, reduction="none")
        ((losses if weights is None else losses * weights.to(losses)).mean()).backward()
        self.own = [parameter.grad for parameter in own.parameters()]

    def after_train_batch(self, state, logger):
        found = [parameter.grad for parameter in state.model.parameters()]
        assert [grad is None for grad in found] == [grad is None for grad in self.own]
        pairs = [(one, other) for one, other in zip(found, self.own, strict=True) if one is not None]
        one, other = (torch.cat([grad.flatten() for grad in each]) for each in zip(*pairs, strict=True))
        self.errors.append(float((one - other).norm() / other.norm()))


def count(batch):
    return len(batch["y"] if isinstance(batch, dict) else batch[1])


def batches(kind, steps, seed=0):
    torch.manual_seed(seed)
    return [kind(torch.randn(M, 12), torch.randint(5, (M,))) for _ in range(steps)]


def fit(model, data, algorithm, others=(), callbacks=(), microbatch_size=M):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(
            model=model,
            train_dataloader=DataSpec(data, get_num_samples_in_batch=count),
            optimizers=torch.optim.SGD(model.parameters(), lr=0.05),
            max_duration=f"{len(data)}ba",
            algorithms=[algorithm, *others],
            algorithm_passes=[select_first],
            callbacks=list(callbacks),
            device_train_microbatch_size=microbatch_size,
            seed=1,
            progress_bar=False,
            device="cpu",
        )
        trainer.fit()
    return [str(each.message) for each in caught if "forward passes are made" in str(each.message)]


def checked(model, kind=tuples, steps=5, select=GradMatch, others=(), microbatch_size=M, data=None):
    keys = {"input_key": "x", "target_key": "y"} if kind is dicts else {}
    algorithm = select(0.0, 1.0, KEEP, interrupt=0, reuse_activations=True, **keys)
    compare = AgainstOwn(record_selections(algorithm), kind)
    data = batches(kind, steps) if data is None else data
    said = fit(model, data, algorithm, others, [compare], microbatch_size)
    assert len(compare.errors) == len(data)
    assert max(compare.errors) < 1e-3, compare.errors
    return said
