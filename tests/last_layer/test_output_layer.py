"""Pure functions that find an output layer and show what its gradients are made with."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from cases import MLP, NUM_CLASSES, Reordered
from oracles import classifier_gradients
from torch import nn

from composer_gradmatch import last_layer_gram, select_using_gradient_matching
from composer_gradmatch.last_layer import OutputLayerTap, sample_dim
from composer_gradmatch.last_layer.output_layer import (
    CheckedTap,
    learned_behind,
    linear_fault,
    observe_output_layer,
    returned_tensors,
)


def test_logits_are_looked_at_first_where_outputs_name_them():
    logits, cache, loss = torch.ones(3, 2), torch.zeros(3, 2), torch.tensor(1.0)
    assert returned_tensors({"past": cache, "logits": logits}) == [logits]
    assert returned_tensors((loss, logits, (cache,)))[0] is logits
    assert len(returned_tensors((loss, logits, (cache,)))) == 1
    assert len(returned_tensors((logits, cache))) == 2
    assert len(returned_tensors({"a": logits, "b": cache})) == 2
    assert returned_tensors(logits)[0] is logits


CHANGES = {
    "a slice, copied": lambda z: z[:, :3].contiguous(),
    "an index": lambda z: z[torch.arange(len(z)), torch.zeros(len(z), dtype=torch.int64)][:, None],
    "float64": lambda z: z.double(),
    "scaled": lambda z: z / 0.07,
    "log softmax": lambda z: z.log_softmax(-1),
    "pooled": lambda z: z.mean(1, keepdim=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("shared", [False, True])
def test_a_part_or_a_function_of_an_output_leads_to_its_layer(change, shared):
    class Changes(nn.Module):
        """With a layer of as many outputs before the head."""

        def __init__(self):
            super().__init__()
            self.body, self.before, self.head = nn.Linear(6, 8), nn.Linear(8, NUM_CLASSES), nn.Linear(NUM_CLASSES, 5)

        def forward(self, inputs):
            before = self.before(torch.tanh(self.body(inputs)))
            logits = change(self.head(torch.tanh(before)))
            return {"logits": logits, "cache": before} if shared else logits

    model = Changes()
    assert observe_output_layer(model, torch.randn(7, 4, 6)) is model.head
    assert not any(layer._forward_hooks for layer in model.modules())


def test_two_layers_that_are_added_are_no_single_output_layer():
    class Added(Reordered):
        def forward(self, inputs):
            hidden = torch.relu(self.body(inputs))
            return self.head(hidden) + self.unused(hidden)

    with pytest.raises(ValueError, match="head, body, unused"):
        observe_output_layer(Added(), torch.randn(4, 12))


def test_a_convolution_behind_a_layer_is_named():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.last = nn.Linear(6, 5), nn.Conv1d(5, 5, 1)

        def forward(self, inputs):
            return self.last(self.head(inputs)[:, :, None])[:, :, 0].clone()

    with pytest.raises(ValueError, match=r"last\.(weight|bias) \(of Conv1d\)"):
        observe_output_layer(Behind(), torch.randn(4, 6))


def test_one_output_without_its_dimension_leads_to_its_layer():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 1)

        def forward(self, inputs):
            return self.head(inputs).squeeze(-1).clone()

    model = Scalar()
    assert observe_output_layer(model, torch.randn(4, 6)) is model.head


def test_a_learned_temperature_is_named_and_not_called_a_head():
    class Temperature(Reordered):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, inputs):
            return super().forward(inputs) / self.temperature

    with pytest.raises(
        ValueError, match=r"no nn\.Linear.*made with the parameter temperature \(of Temperature\)"
    ) as error:
        observe_output_layer(Temperature(), torch.randn(4, 12))
    assert "tied" not in str(error.value)


def sample_grads(dim, shape, samples):
    def grads_of(sample):
        grads = torch.zeros(shape)
        grads.select(dim, sample)[:] = 1.0
        return grads * samples

    return grads_of


@pytest.mark.parametrize(
    ("shape", "m", "dim"),
    [((5, 3), 5, 0), ((5, 7, 3), 5, 0), ((7, 5, 3), 5, 1), ((7, 2, 5, 3), 5, 2), ((1, 7, 3), 1, 0)],
)
def test_the_samples_dimension_is_the_one_of_their_number(shape, m, dim):
    assert sample_dim(shape, m) == dim


@pytest.mark.parametrize(("shape", "m"), [((4, 5), 5), ((4, 6, 5), 5), ((35, 3), 5)])
def test_no_dimension_of_their_number_is_none(shape, m):
    assert sample_dim(shape, m) is None


@pytest.mark.parametrize("dim", [0, 1])
def test_where_lengths_agree_one_samples_gradient_decides(dim):
    assert sample_dim((5, 5, 3), 5, sample_grads(dim, (5, 5, 3), 1.0)) == dim
    only_first = torch.zeros(5, 5, 1)
    only_first.select(1 - dim, 0)[:] = 1.0  # The first position only.
    assert sample_dim((5, 5, 3), 5, sample_grads(dim, (5, 5, 3), only_first)) == dim


def test_a_sample_that_is_masked_or_not_finite_decides_nothing():
    assert sample_dim((5, 5, 3), 5, lambda sample: torch.zeros(5, 5, 3)) == 0
    assert sample_dim((5, 5, 3), 5, lambda sample: torch.full((5, 5, 3), torch.nan)) == 0
    real = sample_grads(1, (5, 5, 3), 1.0)
    assert sample_dim((5, 5, 3), 5, lambda sample: real(sample) * (sample > 2)) == 1


def test_losses_that_mix_samples_have_no_dimension():
    with pytest.raises(ValueError, match="more than one index of each dimension"):
        sample_dim((5, 5, 3), 5, lambda sample: torch.ones(5, 5, 3))


def behind(loss, module=None):
    module = Reordered() if module is None else module
    with OutputLayerTap(module.head).open() as tap:
        losses = loss(module, module(torch.randn(4, 12)))
        return learned_behind(losses, tap.leaf, module)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x * weight.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad * weight.sum(), torch.zeros_like(weight)


def test_parameters_behind_are_those_that_gradients_at_the_output_are_made_with():
    assert behind(lambda module, z: z.square().sum(1)) == []
    assert behind(lambda module, z: module.unused(z @ torch.ones(5, 16)).square().sum(1)) == [
        "unused.bias",
        "unused.weight",
    ]
    assert behind(lambda module, z: (z + module.unused.bias).logsumexp(1)) == ["unused.bias"]
    # Of no sample's own: a penalty.
    assert behind(lambda module, z: z.square().sum(1) + module.body.weight.square().sum()) == []
    assert behind(lambda module, z: Once.apply(z, module.body.bias).sum(1)) == ["body.bias"]
    other = nn.Parameter(torch.ones(5))
    assert behind(lambda module, z: (z * other).square().sum(1)) == ["one of shape (5,) that is not the model's"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 300), (3, 200, 300)])
def test_rounding_is_no_fault_and_one_other_number_is(dtype, shape):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(300, 7).to(dtype), torch.randn(shape).to(dtype)
    output = layer(inputs)
    assert linear_fault(layer, inputs, output) is None
    changed = output.clone()
    changed[-1, ..., 3] += 0.5
    assert linear_fault(layer, inputs, changed) == "it is not in this batch"


def test_autocast_rounds_what_comes_out_in_float32_too():
    layer, inputs = nn.Linear(300, 7), torch.randn(40, 300)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_fault(layer, inputs, layer(inputs)) is None
        assert linear_fault(layer, inputs, layer(inputs).float()) is None
        assert linear_fault(layer, inputs, layer(inputs).float() * 1.5) is not None


def test_a_margin_at_one_class_is_seen():
    class Margin(nn.Linear):
        def forward(self, input):
            return super().forward(input) - 0.5 * F.one_hot(torch.arange(len(input)) % 1000, 1000)

    layer, inputs = Margin(16, 1000), torch.randn(8, 16)
    for dtype in (torch.float32, torch.bfloat16):
        layer, inputs = layer.to(dtype), inputs.to(dtype)
        assert linear_fault(layer, inputs, layer(inputs)) is not None


def test_a_scale_that_starts_at_one_is_seen():
    class Scaled(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input):
            return super().forward(input) * self.scale

    layer, inputs = Scaled(16, 5), torch.randn(8, 16)
    kept = {key: value.clone() for key, value in layer.state_dict().items()}
    assert "other values of its parameters (weight, bias, scale)" in str(linear_fault(layer, inputs, layer(inputs)))
    assert all(torch.equal(value, kept[key]) for key, value in layer.state_dict().items())


def test_a_weight_that_is_packed_cannot_be_compared_but_under_linears_own_forward():
    class Packed(nn.Linear):
        def forward(self, input):
            return torch.zeros(*input.shape[:-1], self.out_features)

    for kind in (Packed, nn.Linear):
        layer = kind(16, 5)
        layer.weight = nn.Parameter(torch.zeros(40, 1, dtype=torch.uint8), requires_grad=False)
        fault = linear_fault(layer, torch.randn(8, 16), torch.zeros(8, 5))
        assert (fault is None) == (kind is nn.Linear)


def test_a_layer_called_by_keyword_is_tapped():
    class Keyword(Reordered):
        def forward(self, inputs):
            return self.head(input=torch.relu(self.body(inputs)))

    inputs, targets = MLP.data(9).tensors
    model = Keyword().double()
    with CheckedTap(model, model.head, chosen=False).open() as tap:
        h, p = tap.inputs_and_grads(F.cross_entropy(model(inputs.double()), targets, reduction="none"))
    gradients = torch.from_numpy(classifier_gradients(model, "head", inputs, targets))
    torch.testing.assert_close(last_layer_gram(h, p), gradients @ gradients.T)


def test_losses_that_do_not_depend_on_the_layer_are_told():
    model = Reordered()
    with OutputLayerTap(model.head).open() as tap:
        model(torch.randn(4, 12))
        with pytest.raises(ValueError, match="do not depend on the output layer's output"):
            tap.inputs_and_grads(model.body.bias.square().sum().expand(4))


def without_reduction(outputs, target):
    return F.cross_entropy(outputs, target)


@pytest.mark.parametrize("loss", [without_reduction, nn.CrossEntropyLoss(reduction="none"), "cross_entropy"])
def test_a_loss_that_takes_no_reduction_is_explained(loss):
    inputs, targets = MLP.data(9).tensors
    with pytest.raises(
        TypeError, match=r"loss_fun (takes no keyword argument 'reduction'|must be a function).*F\.cross"
    ):
        select_using_gradient_matching(inputs, targets, MLP.module(), loss)


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        lambda outputs, target, **kwargs: F.cross_entropy(outputs, target, **kwargs),
    ],
)
def test_a_loss_that_takes_it_in_another_way_is_taken(loss):
    inputs, targets = MLP.data(9).tensors
    assert len(select_using_gradient_matching(inputs, targets, MLP.module(), loss, 0.5)[0]) <= 4


def test_keep_of_one_keeps_all_as_they_are():
    inputs, targets = MLP.data(9).tensors
    picked, picked_targets, weights = select_using_gradient_matching(
        inputs, targets, MLP.module(), F.cross_entropy, 1.0
    )
    assert torch.equal(picked, inputs)
    assert torch.equal(picked_targets, targets)
    assert weights.tolist() == [1.0] * 9


def test_the_functional_step_refuses_and_warns_as_the_algorithm_does():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body = nn.Embedding(NUM_CLASSES, 8), nn.Linear(12, 8)

        def forward(self, inputs):
            return F.linear(self.body(inputs), self.embedding.weight)

    class Normalised(nn.Linear):
        def forward(self, input):
            return super().forward(F.normalize(input, dim=-1))

    inputs, targets = MLP.data(9).tensors
    with pytest.raises(ValueError, match=r"embedding\.weight"):
        select_using_gradient_matching(inputs, targets, Tied(), F.cross_entropy)
    with pytest.warns(UserWarning, match=r"output_layer='body' is not what.*embedding\.weight"):
        select_using_gradient_matching(inputs, targets, Tied(), F.cross_entropy, output_layer="body")
    with pytest.raises(ValueError, match="does not put out its input times"):
        select_using_gradient_matching(inputs, targets, nn.Sequential(Normalised(12, 5)), F.cross_entropy)
