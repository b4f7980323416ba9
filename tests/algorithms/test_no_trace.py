"""The selection pass leaves no trace, and scales only its own inputs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import ANY_SIZE, BATCHNORM, ON, fit
from composer.algorithms import SelectiveBackprop
from selecting import LOOKING


class Aside:
    """A rule whose draws move no generator, as they are meant to; the pass is not."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, candidates, m):
        with torch.random.fork_rng():
            return self.rule(candidates, m)

    def __getattr__(self, name):
        return getattr(self.rule, name)


@pytest.mark.parametrize("algorithm_class", LOOKING)
def test_the_selection_pass_leaves_no_trace(algorithm_class, monkeypatch):
    model = BATCHNORM.model()
    algorithm = algorithm_class(keep=0.4, **ON)
    original = algorithm._after_dataloader
    traces = []

    def fingerprint():
        return {
            "buffers": {k: v.clone() for k, v in model.named_buffers()},
            "buffer_ids": [id(v) for v in model.buffers()],
            "rng": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].copy(),
            "python": random.getstate(),
            "training": [m.training for m in model.modules()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "grads": [p.grad for p in model.parameters()],
            "hooks": [dict(m._forward_hooks) for m in model.modules()],
            "grad_mode": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        }

    def watched(state, logger):
        before = fingerprint()
        original(state, logger)
        traces.append((before, fingerprint()))
        assert len(state.batch[0]) < 20

    monkeypatch.setattr(algorithm, "_after_dataloader", watched)
    monkeypatch.setattr(algorithm.selector, "_function", Aside(algorithm.selector._function))
    fit([algorithm], model, BATCHNORM.data(60), max_duration="1ep")
    assert len(traces) == 3
    for before, after in traces:
        for key, value in before.pop("buffers").items():
            assert torch.equal(value, after["buffers"][key]), key
        after.pop("buffers")
        assert torch.equal(before.pop("rng"), after.pop("rng"))
        np.testing.assert_array_equal(before.pop("numpy"), after.pop("numpy"))
        assert before == after
    assert model.module[1].num_batches_tracked == 3


def test_composers_own_selection_pass_does_leave_a_trace():
    """What the test above would look like without the care: BatchNorm counts each batch twice."""
    model = BATCHNORM.model()
    fit([SelectiveBackprop(keep=0.4, **ON)], model, BATCHNORM.data(60), max_duration="1ep")
    assert model.module[1].num_batches_tracked == 6


@pytest.mark.parametrize("algorithm_class", LOOKING)
def test_scale_factor_shrinks_the_inputs_of_the_selection_pass_only(algorithm_class):
    model = ANY_SIZE.model()
    sizes = []
    model.module.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    algorithm = algorithm_class(keep=0.5, scale_factor=0.5, **ON)
    fit([algorithm], model, ANY_SIZE.data(20), device_train_microbatch_size=20)
    assert sizes[-1][1:] == (1, 8, 8)
    assert sizes[-1][0] <= 10
    assert {size[1:] for size in sizes[:-1]} == {(1, 4, 4)}
    assert (20, 1, 4, 4) in sizes
