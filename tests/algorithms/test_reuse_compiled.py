"""Steps of one forward pass of models that are trained compiled."""

from __future__ import annotations

import warnings
from functools import cache, partial

import pytest
import torch
from cases import (
    BATCHNORM,
    CONV,
    Case,
    loader,
)
from one_pass import M, always, assert_same_parameters, trained
from text_cases import CLASSIFICATION
from torch import nn

from composer_gradmatch.reuse.inductor import InductorGraph


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, inputs):
        return self.head(nn.functional.dropout(self.norm(self.body(inputs)).relu(), 0.3, self.training))


def train_in_steps(case, config):
    """Four steps, of which the third is of a smaller minibatch."""
    model = case.model()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "GradMatch")
        trained(
            model,
            loader(case.data(40), 16),
            [always()],
            max_duration="4ba",
            seed=3,
            device_train_microbatch_size=4,
            compile_config=config,
        )
    return model


@pytest.fixture(scope="module")
def uncompiled():
    """Trains each case once, for all backends."""
    return cache(partial(train_in_steps, config=None))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("case", [CONV, BATCHNORM, Case("dropout", Dropout, "head", (12,))], ids=lambda case: case.name)
def test_a_model_that_is_compiled(case, backend, uncompiled, served, monkeypatch):
    """By Inductor, both graphs are compiled, too; the last minibatch and microbatch are smaller."""
    called = set()
    original = InductorGraph.__call__

    def call(self, *args):
        called.add(self)
        return original(self, *args)

    monkeypatch.setattr(InductorGraph, "__call__", call)
    expected = uncompiled(case)
    assert served in ([], [4, 2, 4, 2, 3, 4, 2])
    del served[:]
    model = train_in_steps(case, {"backend": backend})
    assert served == [4, 2, 4, 2, 3, 4, 2]
    assert_same_parameters(expected, model)
    assert bool(called) == (backend == "inductor")
    assert len(called) % 2 == 0, "one forward, one backward graph for each capture"
    assert not any(graph.failure for graph in called)


@pytest.mark.parametrize("reuse", [False, True])
def test_a_huggingface_model_that_is_compiled(reuse, served):
    """On eight samples: as many as the first batch's checks take, so that it is compiled for few sizes."""
    models = []
    for config in (None, {"backend": "aot_eager"}):
        model = CLASSIFICATION.model()
        trained(model, loader(CLASSIFICATION.data(8), 8), [always(reuse=reuse)], compile_config=config)
        models.append(model)
    assert served == [3, 3] * reuse
    assert_same_parameters(*models)


def test_a_graph_that_inductor_cannot_compile_runs_as_it_is(served, monkeypatch):
    def fails(*_):
        raise ValueError("no such device")

    original = InductorGraph.__init__

    def with_a_backend_that_fails(self, module):
        original(self, module)
        self._compiled = torch.compile(module.forward, backend=fails)

    monkeypatch.setattr(InductorGraph, "__init__", with_a_backend_that_fails)
    models = [CONV.model(), CONV.model()]
    trained(models[0], loader(CONV.data(M), M), [always()])
    with pytest.warns(UserWarning, match="runs uncompiled: ValueError: no such device"):
        trained(models[1], loader(CONV.data(M), M), [always()], compile_config={})
    assert served == [9, 9]
    assert_same_parameters(*models)
