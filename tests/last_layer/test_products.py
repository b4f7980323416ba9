"""K of heads that are no ``nn.Linear``, against autograd's gradient of each sample in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from head_models import LENGTH, USES, VOCABULARY, Causal, Segmentation, Tied
from oracles import per_sample_gradients
from torch import nn

from composer_gradmatch import last_layer_gram
from composer_gradmatch.last_layer import CheckedTap, name_of, observe_output_layer, resolve_output_layer
from composer_gradmatch.last_layer.gradients import LayerGradients, gram_of_all

M = 5


def losses_of(logits, classes):
    classes = classes[:, : logits.shape[1]] % logits.shape[-1]
    return F.cross_entropy(logits.transpose(1, 2), classes, reduction="none").sum(1)


def gram_by_tap(model, layer, batch, losses, chosen=False):
    with CheckedTap(model, layer, chosen).open() as tap:
        found = losses(model(batch))
        inputs, grads = tap.inputs_and_grads(found)
    assert tap.warning is None
    assert tap.outputs.shape == grads.shape
    return gram_of_all([LayerGradients.of(layer, inputs, grads, tap.outputs, M)], layer)


def explicit_gram(model, parameters, batch, losses):
    found = losses(model(batch))
    gradients = per_sample_gradients(lambda i: found[i], parameters, M)
    return gradients @ gradients.T


def tokens():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (M, LENGTH), generator=generator) for _ in range(2)]


@pytest.mark.parametrize(("use", "names"), USES.values(), ids=USES.keys())
@pytest.mark.parametrize("named", [False, True])
def test_a_product_with_a_parameter_is_found_and_its_gradients_are_autograds(use, names, named):
    torch.manual_seed(0)
    model = Causal(use).double()
    batch, classes = tokens()
    holder = "embedding.weight" if names[0] == "weight" else names[0]
    layer = resolve_output_layer(model, holder, batch) if named else observe_output_layer(model, batch)
    assert name_of(model, layer) == repr(holder)
    gram = gram_by_tap(model, layer, batch, lambda logits: losses_of(logits, classes), named)
    apart = model.head_apart()
    expected = explicit_gram(model, [apart[name] for name in names], batch, lambda logits: losses_of(logits, classes))
    torch.testing.assert_close(gram, expected, **({"rtol": 1e-4, "atol": 1e-4} if use is USES["cast"][0] else {}))


@pytest.mark.parametrize("name", [None, "wte", "wte.weight"])
def test_mpts_tied_head_is_found(name):
    torch.manual_seed(0)
    model, (batch, classes) = Tied().double(), tokens()
    layer = observe_output_layer(model, batch) if name is None else resolve_output_layer(model, name, batch)
    assert layer.modules == (model.wte, model.wte)  # Where to look for it: not in all of the model's forward.
    gram = gram_by_tap(model, layer, batch, lambda logits: losses_of(logits, classes))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    (weight,) = model.head_apart().values()
    torch.testing.assert_close(gram, explicit_gram(model, [weight], batch, lambda logits: losses_of(logits, classes)))


@pytest.mark.parametrize("change", ["", "upsampled", "pooled", "pooled before", "without a bias", "on sequences"])
def test_a_convolution_with_a_kernel_of_one_element_is_found(change):
    torch.manual_seed(0)

    class Changed(Segmentation):
        def forward(self, images):
            if change == "on sequences":
                images = images.flatten(2)
            hidden = torch.tanh(self.body(images))
            logits = self.head(hidden.mean((2, 3), keepdim=True) if change == "pooled before" else hidden)
            if change == "upsampled":
                return F.interpolate(logits, scale_factor=2)
            return logits.mean((2, 3)) if change == "pooled" else logits

    model = Changed(nn.Conv2d(6, 3, 1, bias=change != "without a bias")).double()
    if change == "on sequences":
        model.body, model.head = nn.Conv1d(2, 6, 3, padding=1).double(), nn.Conv1d(6, 3, 1).double()
    images, which = torch.randn(M, 2, 4, 5).double(), torch.rand(M, 8, 10) < 0.7

    def losses(logits):
        logits = logits.flatten(2) if logits.dim() > 2 else logits[:, :, None]
        found = F.cross_entropy(logits, torch.arange(logits.shape[2]).expand(M, -1) % 3, reduction="none")
        return (found * which.flatten(1)[:, : logits.shape[2]]).sum(1)

    layer = observe_output_layer(model, images)
    assert (name_of(model, layer), layer.kind) == ("'head'", "a Conv1d" if change == "on sequences" else "a Conv2d")
    gram = gram_by_tap(model, layer, images, losses)
    torch.testing.assert_close(gram, explicit_gram(model, list(model.head.parameters()), images, losses))


def test_a_convolution_of_one_position_has_a_row_for_each_sample():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 3, 1), nn.Flatten())
    images = torch.randn(M, 2, 4, 5)
    with CheckedTap(model, observe_output_layer(model, images), chosen=False).open() as tap:
        inputs, grads = tap.inputs_and_grads(model(images).square().sum(1))
    assert (inputs.shape, grads.shape) == ((M, 6), (M, 3))
    assert last_layer_gram(inputs, grads).shape == (M, M)


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        (nn.Conv2d(6, 3, 3), "its kernel is 3×3"),
        (nn.Conv2d(6, 3, 1, stride=2), "its stride is 2×2"),
        (nn.Conv2d(6, 3, 1, groups=3), "it has 3 groups"),
        (nn.Conv2d(6, 3, 1, padding=1), "it pads its inputs by 1×1"),
    ],
)
def test_another_convolution_is_refused_with_what_is_wrong_with_it(head, fault):
    model = Segmentation(head)
    with pytest.raises(ValueError, match=rf"head\.weight \(of Conv2d\), but {fault}; .* with a kernel of one"):
        observe_output_layer(model, torch.randn(M, 2, 4, 5))
    with pytest.raises(ValueError, match=rf"output_layer='head' must be an nn\.Linear, .* a Conv2d \({fault}\)"):
        resolve_output_layer(model, "head", torch.randn(M, 2, 4, 5))


COMPUTED = {
    "normalised": lambda h, m: F.linear(h, F.normalize(m.weight, dim=-1)),
    "scaled": lambda h, m: h @ (m.weight.T * 0.3),
    "a part": lambda h, m: F.linear(h, m.weight[:4]),
    "from the left": lambda h, m: (m.weight @ h.transpose(1, 2)).transpose(1, 2),
}


@pytest.mark.parametrize("use", COMPUTED.values(), ids=COMPUTED.keys())
def test_a_weight_that_is_computed_is_refused_by_its_parameters_name(use):
    model, (batch, _) = Causal(use), tokens()
    with pytest.raises(ValueError, match=r"embedding\.weight \(of Embedding\), but not by a matrix product of rows"):
        observe_output_layer(model, batch)
    with pytest.raises(ValueError, match=r"='embedding' is an Embedding, of whose weight.*no matrix product"):
        resolve_output_layer(model, "embedding", batch)


def test_a_weight_of_two_products_is_refused_and_of_one_that_runs_twice_too():
    batch, _ = tokens()
    model = Causal(lambda h, m: h @ m.square + h @ m.square.T)
    with pytest.raises(ValueError, match="2 different matrix products"):
        resolve_output_layer(model, "square", batch)
    model = Causal(lambda h, m: F.linear(h, m.weight) + F.linear(h * 2, m.weight))
    with (
        pytest.raises(ValueError, match="ran more than once"),
        CheckedTap(model, resolve_output_layer(model, "embedding", batch), chosen=True).open(),
    ):
        model(batch)


def test_an_error_in_the_forward_pass_leaves_nothing_behind():
    model, (batch, _) = Causal(lambda h, m: F.linear(h, m.weight)), tokens()
    layer = observe_output_layer(model, batch)
    model.body.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), CheckedTap(model, layer, chosen=False).open():
        model(batch)
    with pytest.raises(ZeroDivisionError):
        resolve_output_layer(model, "embedding", batch)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
