"""Runs of one forward pass a step, for the tests of them."""

from __future__ import annotations

import torch
from cases import (
    make_trainer,
)

from composer_gradmatch import GradMatch, select_first

M, KEEP, LR = 23, 0.4, 0.1


def always(algorithm=GradMatch, *, reuse=True, **kwargs):
    return algorithm(start=0.0, end=1.0, keep=KEEP, interrupt=0, reuse_activations=reuse, **kwargs)


def trained(model, train, algorithms, **kwargs):
    trainer = make_trainer(model, train, algorithms, lr=LR, algorithm_passes=[select_first], **kwargs)
    trainer.fit()
    return trainer


def assert_same_parameters(model, other, tolerance=1e-4):
    before, after = (torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (model, other))
    assert (before - after).norm() <= tolerance * before.norm()


def single_pass_of(algorithm):
    """The pass that an algorithm makes its steps with; None where it makes two."""
    return algorithm.selector.source.single
