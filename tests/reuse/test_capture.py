"""When a model is captured anew, what a capture sees, and what it refuses."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from layout_models import CLASSES, ROWS, M, assert_close, built, weighted
from torch import nn
from torch.utils.checkpoint import checkpoint

from composer_gradmatch.last_layer import LinearLayer
from composer_gradmatch.last_layer.product import Product
from composer_gradmatch.reuse.capture import CapturedForward
from composer_gradmatch.reuse.layout import Layout
from composer_gradmatch.reuse.unsupported import UnsupportedError
from composer_gradmatch.reuse.verify import check_outputs


def test_a_hook_that_comes_later_is_run():
    model, inputs, targets = built("mlp")
    model.eval()
    forward = CapturedForward(lambda batch: model(batch[0]), LinearLayer(model[4]))
    graphs = [forward((inputs, targets), M).run.graphs for _ in range(3)]
    handle = model[0].register_forward_hook(lambda module, args, outputs: outputs * 2)
    captured = forward((inputs, targets), M)
    torch.testing.assert_close(captured.outputs, model(inputs).detach())
    handle.remove()
    graphs.append(forward((inputs, targets), M).run.graphs)
    assert len(set(map(id, graphs))) == 1, "our own hook on the layer is no reason to capture anew"
    assert captured.run.graphs is not graphs[0]


class Multiplied(nn.Module):
    """A head that is a product of the root's own, of what a module has computed or of the inputs."""

    def __init__(self, body):
        super().__init__()
        self.body, self.out = body, nn.Parameter(torch.randn(12, CLASSES))

    def forward(self, inputs):
        return (inputs if self.body is None else self.body(inputs)) @ self.out


@pytest.mark.parametrize("body", [nn.Linear(12, 12), None], ids=["after a module", "of the inputs"])
def test_a_product_of_the_root_is_seen_though_its_hooks_do_not_run(body):
    model, inputs = Multiplied(body), torch.randn(M, 12)
    layer = Product(model, "out", transposed=True, caller=model, after=body)
    forward = CapturedForward(model.forward, layer, model=model)
    passes = [forward(inputs, M) for _ in range(3)]
    assert len({id(each.run.graphs) for each in passes}) == 1
    for each in passes:
        torch.testing.assert_close(each.inputs, inputs if body is None else body(inputs).detach())
        torch.testing.assert_close(each.outputs, model(inputs).detach())
        assert each.holds()


def test_graphs_do_not_outlive_what_captured_them():
    model, inputs, targets = built("mlp")
    forward = CapturedForward(lambda batch: model(batch[0]), LinearLayer(model[4]))
    graphs = weakref.ref(forward((inputs, targets), M).run.graphs)
    gc.collect()
    assert graphs() is not None
    del forward
    gc.collect()
    assert graphs() is None


def test_models_that_differ_in_a_number_are_captured_one_after_the_other():
    for rate in (0.2, 0.3, 0.4):
        model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(rate), nn.Linear(16, CLASSES))
        inputs = torch.randn(M, 12)
        torch.manual_seed(1)
        found = CapturedForward(model)(inputs, M).outputs
        torch.manual_seed(1)
        torch.testing.assert_close(found, model(inputs).detach())


def test_the_graphs_serve_batches_of_any_size():
    model, inputs, targets = built("mlp")
    forward = CapturedForward(lambda batch: model(batch[0]))
    graphs = forward((inputs, targets), M).run.graphs
    captured = forward((inputs[:6], targets[:6]), 6)
    assert captured.run.graphs is graphs
    assert captured.outputs.shape == (6, CLASSES)


@pytest.mark.parametrize("name", ["encoder, batch first", "encoder, positions first"])
def test_lengths_that_vary_are_captured_twice(name):
    """Once for the first, once for all others; a length that is M by chance once more, if it comes before them."""
    model, _, targets = built(name)
    forward = CapturedForward(lambda batch: model(batch[0]))
    graphs = []
    for length, samples in [(7, 8), (7, 6), (6, 6), (5, 6), (4, 8), (7, 8), (9, 7), (8, 8)]:
        batch = torch.randn(samples, length, 16)
        state = torch.get_rng_state()
        captured = forward((batch, targets[:samples]), samples)
        found = torch.autograd.grad(weighted(captured.rows(ROWS), targets[ROWS]), list(model.parameters()))
        torch.set_rng_state(state)
        outputs = model(batch)
        expected = torch.autograd.grad(weighted(outputs[ROWS], targets[ROWS]), list(model.parameters()))
        check_outputs([captured.outputs], [outputs])
        assert_close(found, expected)
        graphs.append(captured.run.graphs)
    assert [graphs.index(each) for each in graphs] == [0, 0, 2, 3, 3, 3, 3, 3]


def test_positions_before_samples_are_found():
    model, inputs, targets = built("encoder, batch first")
    layouts = CapturedForward(lambda batch: model(batch[0]))((inputs, targets), M).run.graphs.layouts
    assert Layout(0, 7, 1) in layouts.values(), "nn.TransformerEncoderLayer works position-major inside"
    assert Layout(0, 1, 7) in layouts.values()


def test_the_inputs_of_a_layer_are_seen():
    model, inputs, targets = built("mlp")
    captured = CapturedForward(lambda batch: model(batch[0]), LinearLayer(model[4]))((inputs, targets), M)
    assert captured.inputs.shape == (M, 16)
    torch.testing.assert_close(model[4](captured.inputs), captured.outputs)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, CLASSES)

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return outputs * 2 if outputs.sum() > 0 else outputs


class Returning(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(12, CLASSES), change

    def forward(self, inputs):
        return self.change(self.layer(inputs))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Branching(), "cannot be captured as one graph"),
        (Returning(lambda x: (x, x.mean())), "no row for each sample"),
        (Returning(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)), "checkpoints activations"),
        (Returning(lambda x: x @ x.T), "two dimensions"),
        (Returning(lambda x: x.reshape(-1)), "no row for each sample"),
        (Returning(lambda x: torch.cat([x, x[:1]])), "no row for each sample"),
        (Returning(lambda x: torch.cat([x, torch.zeros(1, CLASSES)])[:-1]), "no multiple of the number of samples"),
        (Returning(lambda x: (x, iter(()))), "cannot be"),
        (Returning(lambda x: x + x[7]), "cannot be run on a few samples"),
        (Returning(lambda x: x + x.view(2, 4, CLASSES).sum(1).repeat(4, 1)), "number of samples"),
    ],
)
def test_what_cannot_be_sliced_says_why(model, why):
    with pytest.raises(UnsupportedError, match=why):
        CapturedForward(lambda batch: model(batch[0]))((torch.randn(M, 12), torch.zeros(M)), M)
