"""The Gram matrix of layers that run at many positions, against explicit gradients by autograd, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import per_sample_gradients
from torch import nn

from composer_gradmatch import last_layer_gram
from composer_gradmatch.last_layer import gradients, position_gram
from composer_gradmatch.last_layer.gradients import LayerGradients, gram_of_all
from composer_gradmatch.last_layer.position_gram import SoftmaxGrads

M, T, D, C = 6, 5, 7, 9


def problem(bias=True, masked=0.4, seed=0, dtype=torch.float64, sizes=(M, T, D, C)):
    """A layer, its inputs, outputs and losses at positions, some of them masked, one sample wholly."""
    m, t, d, c = sizes
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = nn.Linear(d, c, bias=bias).to(dtype)
    inputs = torch.randn(m, t, d, generator=generator, dtype=dtype)
    labels = torch.randint(c, (m, t), generator=generator)
    labels[torch.rand(m, t, generator=generator) < masked] = -100
    if masked:
        labels[m // 2] = -100
    outputs = layer(inputs).detach().requires_grad_()
    losses = F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").reshape(m, t).sum(1)
    (grads,) = torch.autograd.grad(losses.sum(), outputs)
    return layer, inputs, labels, outputs.detach(), grads


def explicit_gram(layer, inputs, labels):
    outputs = layer(inputs)
    losses = F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").reshape(labels.shape).sum(1)
    rows = per_sample_gradients(lambda i: losses[i], list(layer.parameters()), len(inputs))
    return rows @ rows.T


@pytest.fixture(params=["one block", "blocks of one"])
def blocks(request, monkeypatch):
    if request.param == "blocks of one":
        monkeypatch.setattr(position_gram, "BLOCK_BYTES", 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["_over_pairs", "_explicit"])
def test_both_forms_are_the_gram_matrix_of_explicit_gradients(form, bias, blocks):
    layer, inputs, labels, _, grads = problem(bias)
    kept = labels != -100
    h, p, counts = inputs[kept], grads[kept], kept.sum(1)
    if form == "_over_pairs":
        gram = position_gram._over_pairs(h, p, counts, bias)
    else:
        gram = position_gram._explicit(h, lambda start, stop: p[:, start:stop], counts, C, bias)
    torch.testing.assert_close(gram, explicit_gram(layer, inputs, labels), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("as_numpy", [False, True])
def test_the_public_function_takes_positions(as_numpy):
    layer, inputs, labels, _, grads = problem()
    expected = explicit_gram(layer, inputs, labels)
    gram = last_layer_gram(*((inputs.numpy(), grads.numpy()) if as_numpy else (inputs, grads)))
    assert isinstance(gram, np.ndarray if as_numpy else torch.Tensor)
    torch.testing.assert_close(torch.as_tensor(gram), expected, rtol=1e-10, atol=1e-12)
    assert not gram[M // 2].any()


@given(t=st.integers(1, 6), masked=st.sampled_from([0.0, 0.3, 0.9]), seed=st.integers(0, 5))
def test_the_cheaper_form_gives_the_same(t, masked, seed):
    _, inputs, _, _, grads = problem(masked=masked, seed=seed, sizes=(4, t, 3, 5))
    one_by_one = torch.einsum("mtc,mtd->mcd", grads, inputs).flatten(1)
    expected = one_by_one @ one_by_one.T
    torch.testing.assert_close(last_layer_gram(inputs, grads, bias=False), expected, rtol=1e-9, atol=1e-12)


def test_one_position_is_the_two_dimensional_form():
    _, inputs, _, _, grads = problem(masked=0.0, sizes=(M, 1, D, C))
    torch.testing.assert_close(last_layer_gram(inputs, grads), last_layer_gram(inputs[:, 0], grads[:, 0]))


def test_which_form_is_taken_depends_on_what_it_costs(monkeypatch):
    taken = []
    for form in ("_over_pairs", "_explicit"):
        original = getattr(position_gram, form)
        monkeypatch.setattr(
            position_gram, form, lambda *args, _form=form, _do=original: (taken.append(_form), _do(*args))[1]
        )
    for sizes in [(2, 2, 50, 50), (2, 50, 3, 3)]:
        _, inputs, _, _, grads = problem(masked=0.0, sizes=sizes)
        last_layer_gram(inputs, grads)
    assert taken == ["_over_pairs", "_explicit"]


@pytest.mark.parametrize("weights", [None, torch.linspace(0.1, 2.0, C, dtype=torch.float64)])
def test_a_softmax_cross_entropy_is_recognised_and_computed_again(weights, blocks):
    layer, inputs, labels, _, _ = problem()
    kept = labels != -100
    h, labels = inputs[kept], labels[kept]
    z = layer(h).detach().requires_grad_()
    (p,) = torch.autograd.grad(F.cross_entropy(z, labels, weights, reduction="sum"), z)
    softmax = SoftmaxGrads.recognise(z.detach(), p)
    assert softmax is not None
    assert torch.equal(softmax.labels, labels)
    again = [softmax.columns(h, layer.weight.detach(), layer.bias.detach(), i, min(i + 4, C)) for i in range(0, C, 4)]
    torch.testing.assert_close(torch.cat(again, 1), p, rtol=1e-9, atol=1e-12)


def test_p_is_computed_again_in_the_precision_that_the_layer_ran_in():
    """Under autocast H can be float32 where the logits are bfloat16, and labels almost certain."""
    torch.manual_seed(0)
    layer = nn.Linear(D, C)
    layer.weight.data *= 20
    inputs = torch.randn(M, T, D)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs).detach().requires_grad_()
    labels = outputs.argmax(-1)
    labels[0] = 0
    F.cross_entropy(outputs.float().flatten(0, 1), labels.flatten(), reduction="sum").backward()
    part = LayerGradients.of(layer, inputs, outputs.grad, outputs.detach(), M * 10**9)
    assert isinstance(part.grads, SoftmaxGrads)
    p = part.grads.columns(part.inputs, layer.weight.detach(), layer.bias.detach(), 0, C)
    rows = outputs.grad.flatten(0, 1)[outputs.grad.flatten(0, 1).ne(0).any(-1)].float()
    torch.testing.assert_close(p.norm(dim=1), rows.norm(dim=1), rtol=0.02, atol=1e-6)
    assert ((p - rows).norm(dim=1) <= 0.02 * rows.norm(dim=1) + 1e-6).all()


def test_one_smoothed_row_among_many_is_not_overlooked():
    _, _, _, outputs, _ = problem()
    z = outputs.flatten(0, 1).repeat(20, 1).requires_grad_()
    labels = torch.arange(len(z)) % C
    losses = F.cross_entropy(z, labels, reduction="none")
    smoothed = F.cross_entropy(z[:1], labels[:1], label_smoothing=0.01)
    (p,) = torch.autograd.grad(losses[1:].sum() + smoothed, z)
    assert SoftmaxGrads.recognise(z.detach(), p) is None


def test_a_label_that_is_almost_certain_is_recognised():
    z = torch.tensor([[40.0, 0.0, -1.0], [0.0, 60.0, 1.0]], dtype=torch.float32, requires_grad=True)
    (p,) = torch.autograd.grad(F.cross_entropy(z, torch.tensor([0, 1]), reduction="sum"), z)
    assert SoftmaxGrads.recognise(z.detach(), p) is not None


@pytest.mark.parametrize("other", ["label_smoothing", "squared_error"])
def test_another_loss_is_not_taken_for_one(other):
    _, _, _, outputs, _ = problem()
    z = outputs.flatten(0, 1).requires_grad_()
    labels = torch.arange(len(z)) % C
    if other == "label_smoothing":
        loss = F.cross_entropy(z, labels, label_smoothing=0.2, reduction="sum")
    else:
        loss = F.mse_loss(z, F.one_hot(labels, C).double(), reduction="sum")
    (p,) = torch.autograd.grad(loss, z)
    assert SoftmaxGrads.recognise(z.detach(), p) is None


@pytest.mark.parametrize("stored", [0, 10**9])
@pytest.mark.parametrize("bias", [True, False])
def test_gathering_from_microbatches_gives_the_same_whether_p_is_stored_or_computed_again(stored, bias, monkeypatch):
    monkeypatch.setattr(gradients, "STORED_BYTES", stored)
    layer, inputs, labels, outputs, grads = problem(bias)
    slices = (slice(0, 2), slice(2, 3), slice(3, M))
    parts = [LayerGradients.of(layer, inputs[rows], grads[rows], outputs[rows], M) for rows in slices]
    assert all(isinstance(part.grads, torch.Tensor) for part in parts) == bool(stored)
    torch.testing.assert_close(gram_of_all(parts, layer), explicit_gram(layer, inputs, labels), rtol=1e-9, atol=1e-12)


def test_what_is_not_finite_is_told():
    layer, inputs, _, outputs, grads = problem()
    assert LayerGradients.of(layer, inputs, grads, outputs, M).finite
    assert not LayerGradients.of(layer, inputs, grads / 0, outputs, M).finite
