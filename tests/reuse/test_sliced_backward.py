"""The sliced backward pass against autograd's own, on models that lay their activations out in all sorts of ways."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import Autocast, Encoder
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from composer_gradmatch.models.wide_resnet import wide_resnet
from composer_gradmatch.reuse.capture import CapturedForward
from composer_gradmatch.reuse.in_place import compute_in_place
from composer_gradmatch.reuse.layout import Layout
from composer_gradmatch.reuse.unsupported import UnsupportedError
from composer_gradmatch.reuse.verify import check_gradients, check_outputs, picks_normalised_by_all

M, CLASSES = 8, 5
ROWS = torch.tensor([5, 0, 2])
WEIGHTS = torch.tensor([0.5, 2.0, 0.5])


def encoder(batch_first):
    return Encoder(batch_first, width=16, heads=2, layers=2, dropout=0.3)


def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, CLASSES))


def batchnorm(training=True):
    norm = nn.BatchNorm2d(4).train(training)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, CLASSES))


MODELS = {
    "mlp": (mlp, (12,)),
    "bf16": (lambda: Autocast(mlp()), (12,)),
    "encoder, batch first": (lambda: encoder(True), (7, 16)),
    "encoder, positions first": (lambda: encoder(False), (7, 16)),
    "ResNet-18, GroupNorm": (
        lambda: resnet18(num_classes=CLASSES, norm_layer=lambda channels: nn.GroupNorm(8, channels)),
        (3, 32, 32),
    ),
    "ResNet-18, BatchNorm": (lambda: resnet18(num_classes=CLASSES), (3, 32, 32)),
    # In single precision, rounding switches units of its ReLUs on and off.
    "Wide ResNet": (lambda: wide_resnet(10, 1, num_classes=CLASSES).module.double(), (3, 32, 32)),
    "BatchNorm and dropout": (batchnorm, (3, 8, 8)),
    "frozen BatchNorm": (lambda: batchnorm(training=False), (3, 8, 8)),
    "statistics of instances": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(144, CLASSES),
        ),
        (3, 8, 8),
    ),
    "bf16, nearly uniform": (lambda: Autocast(nn.Sequential(NearlyUniform(), nn.Linear(112, CLASSES))), (7, 16)),
    "complex numbers": (lambda: nn.Sequential(nn.Linear(12, 12), Rotated(), nn.Linear(12, CLASSES)), (12,)),
    "rows by index": (lambda: nn.Sequential(nn.Linear(12, CLASSES), LastOf()), (7, 12)),
}


class Rotated(nn.Module):
    """Complex numbers on the way, as in some rotary embeddings."""

    def forward(self, inputs):
        pairs = torch.view_as_complex(inputs.unflatten(-1, (6, 2)))
        return torch.view_as_real(pairs * pairs.abs()).flatten(-2)


class NearlyUniform(nn.Module):
    """Attention at the start of training: in which order its samples are shows in little."""

    def __init__(self):
        super().__init__()
        self.scores, self.values = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, inputs):
        return self.values((0.02 * self.scores(inputs)).softmax(-1)).flatten(1)


class LastOf(nn.Module):
    """Indices of the samples on the way, which the backward pass wants as many of as there are picks."""

    def forward(self, inputs):
        last = inputs[..., 0].argmax(-1)
        return inputs[torch.arange(len(inputs)), last]


def weighted(outputs, targets):
    return (F.cross_entropy(outputs.float(), targets, reduction="none") * WEIGHTS).sum()


def built(name):
    torch.manual_seed(0)
    module, shape = MODELS[name]
    model = module()
    inputs = torch.randn(M, *shape)
    return model, inputs.to(next(model.parameters()).dtype), torch.randint(CLASSES, (M,))


def assert_close(found, expected, tolerance=2e-5):
    flat, reference = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected))
    assert (flat - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("name", MODELS)
def test_the_sliced_gradient_is_autograds_of_the_picks(name):
    """The same masks of dropout; under batch normalisation, the documented formula."""
    model, inputs, targets = built(name)
    own = copy.deepcopy(model)
    forward = CapturedForward(lambda batch: model(batch[0]))
    torch.manual_seed(1)
    captured = forward((inputs, targets), M)
    assert captured.read == [True, False]
    found = torch.autograd.grad(weighted(captured.rows(ROWS), targets[ROWS]), list(model.parameters()))
    torch.manual_seed(1)
    with picks_normalised_by_all(ROWS):
        outputs = own(inputs)
    expected = torch.autograd.grad(weighted(outputs[ROWS], targets[ROWS]), list(own.parameters()))
    check_outputs([captured.outputs], [outputs])
    assert_close(found, expected, 1e-2 if name.startswith("bf16") else 2e-5)


@pytest.mark.parametrize("name", ["ResNet-18, BatchNorm", "BatchNorm and dropout"])
def test_batch_normalisation_keeps_its_statistics_of_all_samples(name):
    model, inputs, targets = built(name)
    own = copy.deepcopy(model)
    torch.manual_seed(1)
    CapturedForward(lambda batch: model(batch[0]))((inputs, targets), M)
    torch.manual_seed(1)
    own(inputs)
    changed = False
    for (key, found), before, expected in zip(
        model.named_buffers(), built(name)[0].buffers(), own.buffers(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=key)
        changed |= not torch.equal(found, before)
    assert changed


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


def test_microbatches_add_up_and_their_number_may_be_one():
    model, inputs, targets = built("encoder, batch first")
    captured = CapturedForward(lambda batch: model(batch[0]))((inputs, targets), M)
    whole = torch.autograd.grad(weighted(captured.rows(ROWS), targets[ROWS]), list(model.parameters()))
    for row, weight in zip(ROWS, WEIGHTS, strict=True):
        loss = F.cross_entropy(captured.rows(row[None]), targets[row][None]) * weight
        loss.backward()
    check_gradients([p.grad for p in model.parameters()], whole)


def saved_activations():
    """A pass over M samples of which the three at ROWS are picked, and what it has saved of its own."""
    model, inputs, targets = built("encoder, positions first")
    captured = CapturedForward(lambda batch: model(batch[0]))((inputs, targets), M)
    captured.run.num_picks = len(ROWS)
    ours = {tensor.untyped_storage().data_ptr() for tensor in (inputs, captured.outputs, *model.parameters())}
    saved = [tensor.untyped_storage() for tensor in captured.run.saved]
    activations = [StorageWeakRef(storage) for storage in saved if storage.data_ptr() not in ours]
    assert len(activations) > 20

    def loss(picks):
        rows = ROWS[picks]
        losses = F.cross_entropy(captured.rows(rows, picks), targets[rows], reduction="none")
        return (losses * WEIGHTS[picks]).sum()

    return captured.run, loss, list(model.parameters()), activations


def kept(activations):
    return sum(not each.expired() for each in activations)


def test_the_last_backward_pass_lets_go_of_what_was_saved():
    run, loss, parameters, activations = saved_activations()
    whole = torch.autograd.grad(loss([0, 1, 2]), parameters, retain_graph=True)
    first = torch.autograd.grad(loss([1]), parameters)
    assert kept(activations) == len(activations)
    last = torch.autograd.grad(loss([2, 0]), parameters)
    assert kept(activations) == 0
    assert run.spent
    assert_close([one + other for one, other in zip(first, last, strict=True)], whole, 1e-6)


def test_a_graph_that_is_kept_can_be_run_again_and_one_that_is_not_says_so():
    run, loss, parameters, activations = saved_activations()
    value = loss([0, 1, 2])
    kept_graph = torch.autograd.grad(value, parameters, retain_graph=True)
    assert kept(activations) == len(activations)
    assert_close(torch.autograd.grad(value, parameters), kept_graph, 1e-6)
    assert run.spent
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, parameters)


def test_picks_whose_outputs_are_taken_twice_keep_what_was_saved_for_both():
    _run, loss, parameters, activations = saved_activations()
    one, other = loss([0, 1, 2]), loss([0, 1, 2])
    once = torch.autograd.grad(one, parameters, retain_graph=True)
    assert_close(torch.autograd.grad(one + other, parameters), [2 * gradient for gradient in once], 1e-6)
    assert kept(activations) == 0


def test_picks_that_are_only_looked_at_do_not_count():
    run, loss, parameters, activations = saved_activations()
    loss([0, 1, 2])
    torch.autograd.grad(loss([0, 1]), parameters)
    loss([0, 1, 2])
    assert not run.spent
    torch.autograd.grad(loss([2]), parameters)
    assert run.spent
    assert kept(activations) == 0


def test_picks_that_come_again_are_counted_anew():
    """As where memory runs out in the second of two microbatches, and all are made again, smaller."""
    _run, loss, parameters, activations = saved_activations()
    torch.autograd.grad(loss([0, 1]), parameters)
    torch.autograd.grad(loss([0]), parameters)
    torch.autograd.grad(loss([1]), parameters)
    assert kept(activations) == len(activations)
    torch.autograd.grad(loss([2]), parameters)
    assert kept(activations) == 0


def test_a_tensor_that_is_returned_twice_is_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, CLASSES)

        def forward(self, inputs):
            outputs = self.head(inputs)
            return {"logits": outputs, "again": outputs, "half": outputs / 2}

    model, inputs, targets = Twice(), torch.randn(M, 12), torch.randint(CLASSES, (M,))
    rows = CapturedForward(model)(inputs, M).rows(ROWS)
    for keys in (["logits"], ["again"], ["logits", "again", "half"]):
        found = torch.autograd.grad(
            weighted(sum(rows[key] for key in keys), targets[ROWS]), list(model.parameters()), retain_graph=True
        )
        outputs = model(inputs[ROWS])
        expected = torch.autograd.grad(
            weighted(sum(outputs[key] for key in keys), targets[ROWS]), list(model.parameters())
        )
        assert_close(found, expected)


def test_parameters_that_a_loss_does_not_reach_have_no_gradient():
    """None, as without us: an optimiser that decays weights would move them by a gradient of zero."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aside = nn.Linear(12, 8), nn.Linear(8, CLASSES), nn.Linear(8, 2)

        def forward(self, inputs):
            hidden = self.body(inputs).tanh()
            return self.head(hidden), self.aside(hidden)

    model, inputs, targets = Auxiliary(), torch.randn(M, 12), torch.randint(CLASSES, (M,))
    captured = CapturedForward(model)(inputs, M)
    for loss in (lambda out: weighted(out[0], targets[ROWS]), lambda out: out[1].square().sum()):
        found, expected = [], []
        for gradients, outputs in ((found, captured.rows(ROWS)), (expected, model(inputs[ROWS]))):
            gradients += torch.autograd.grad(loss(outputs), list(model.parameters()), allow_unused=True)
        assert [each is None for each in found] == [each is None for each in expected]
        assert sum(each is None for each in found) == 2
        assert_close(*([each for each in g if each is not None] for g in (found, expected)))


def test_a_hook_that_comes_later_is_run():
    model, inputs, targets = built("mlp")
    model.eval()
    forward = CapturedForward(lambda batch: model(batch[0]), model[4])
    graphs = [forward((inputs, targets), M).run.graphs for _ in range(3)]
    handle = model[0].register_forward_hook(lambda module, args, outputs: outputs * 2)
    captured = forward((inputs, targets), M)
    torch.testing.assert_close(captured.outputs, model(inputs).detach())
    handle.remove()
    graphs.append(forward((inputs, targets), M).run.graphs)
    assert len(set(map(id, graphs))) == 1, "our own hook on the layer is no reason to capture anew"
    assert captured.run.graphs is not graphs[0]


def test_graphs_do_not_outlive_what_captured_them():
    model, inputs, targets = built("mlp")
    forward = CapturedForward(lambda batch: model(batch[0]), model[4])
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


SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1}
LANGUAGE_MODELS = {
    # Its token ids and its mask are never compared, and so have a number of samples each.
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24, num_attention_heads=2)),
    # Its backward pass views tensors that are laid out in another order of dimensions.
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_causal_language_models(name):
    torch.manual_seed(0)
    model = LANGUAGE_MODELS[name]()
    batch = {"input_ids": torch.randint(30, (M, 7)), "attention_mask": torch.ones(M, 7, dtype=torch.int64)}
    picked = {key: value[ROWS] for key, value in batch.items()}
    captured = CapturedForward(lambda batch: model(**batch).logits)(batch, M)
    found, expected = (
        torch.autograd.grad(outputs.square().mean(), list(model.parameters()))
        for outputs in (captured.rows(ROWS), model(**picked).logits)
    )
    assert_close(found, expected)


def test_positions_before_samples_are_found():
    model, inputs, targets = built("encoder, batch first")
    layouts = CapturedForward(lambda batch: model(batch[0]))((inputs, targets), M).run.graphs.layouts
    assert Layout(0, 7, 1) in layouts.values(), "nn.TransformerEncoderLayer works position-major inside"
    assert Layout(0, 1, 7) in layouts.values()


def test_the_inputs_of_a_layer_are_seen():
    model, inputs, targets = built("mlp")
    captured = CapturedForward(lambda batch: model(batch[0]), model[4])((inputs, targets), M)
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


def test_what_only_works_on_each_sample_is_not_taken_for_mixing():
    """Indices of the samples, statistics of each, batch statistics that only a buffer holds."""

    class Innocent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.InstanceNorm1d(3), nn.Linear(12, CLASSES)
            self.register_buffer("level", torch.zeros(()))

        def forward(self, inputs):
            hidden = self.norm(inputs.unflatten(1, (3, 4))).flatten(1)
            self.level.mul_(0.9).add_(inputs.mean(), alpha=0.1)
            last = hidden[torch.arange(len(hidden)), inputs.argmax(1)]
            return self.head(hidden) * last[:, None]

    model, inputs, targets = Innocent(), torch.randn(M, 12), torch.randint(CLASSES, (M,))
    captured = CapturedForward(model)(inputs, M)
    found = torch.autograd.grad(weighted(captured.rows(ROWS), targets[ROWS]), list(model.parameters()))
    expected = torch.autograd.grad(weighted(model(inputs[ROWS]), targets[ROWS]), list(model.parameters()))
    assert_close(found, expected)
