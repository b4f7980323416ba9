"""What is computed in place."""

from __future__ import annotations

import pytest
import torch
from layout_models import M, built
from torch.fx.experimental.proxy_tensor import make_fx

from composer_gradmatch.reuse.capture import CapturedForward
from composer_gradmatch.reuse.in_place import compute_in_place


@pytest.mark.parametrize("name", ["ResNet-18, GroupNorm", "ResNet-18, BatchNorm"])
def test_relus_and_sums_are_computed_in_place(name):
    """All of a ResNet-18's, and none that others read; the tests of gradients cover that it changes no value."""
    model, inputs, targets = built(name)
    before = inputs.clone()
    graphs = CapturedForward(lambda batch: model(batch[0]))((inputs, targets), M).run.graphs
    targets_run = [node.target for node in graphs.run_forward.graph.nodes]
    assert targets_run.count(torch.relu_) == 17
    assert targets_run.count(torch.Tensor.add_) == 8
    assert torch.equal(inputs, before)


@pytest.mark.parametrize(
    ("change", "overwritten"),
    [
        (lambda x, y: (x @ y.T).relu() + x @ y.T, 2),
        (lambda x, y: (z := x @ y.T).relu() + z, 0),
        (lambda x, y: x.relu() + y, 0),
        (lambda x, y: (z := x @ y.T) + z, 1),
        (lambda x, y: y[:, :1] + x @ y.T, 1),
        (lambda x, y: x.sum(1) + x @ y.T, 1),
        (lambda x, y: torch.add(x, x @ y.T, alpha=2), 0),
        (lambda x, y: (x @ y.T).double() + x @ y.T, 0),
    ],
)
def test_what_is_still_read_is_not_overwritten(change, overwritten):
    x, y = torch.randn(6, 6), torch.randn(6, 6)
    own = make_fx(change, tracing_mode="fake")(x, y)
    graph = compute_in_place(own)
    before = x.clone(), y.clone()
    in_place = (torch.relu_, torch.Tensor.add_)
    assert sum(node.target in in_place for node in graph.graph.nodes) == overwritten
    assert torch.equal(graph(x, y), change(x, y))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
