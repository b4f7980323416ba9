"""Finding the layer that what a model returns is made from by nothing learned."""

from __future__ import annotations

import pytest
import torch
from cases import NUM_CLASSES, Reordered
from torch import nn

from composer_gradmatch.last_layer import LinearLayer
from composer_gradmatch.last_layer.observe import observe_output_layer, returned_tensors


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
    assert observe_output_layer(model, torch.randn(7, 4, 6)) == LinearLayer(model.head)
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
            self.head, self.last = nn.Linear(6, 5), nn.Conv1d(5, 5, 3, padding=1)

        def forward(self, inputs):
            return self.last(self.head(inputs)[:, :, None])[:, :, 0].clone()

    with pytest.raises(ValueError, match=r"last\.weight \(of Conv1d\), but its kernel is 3; .*Put such a one"):
        observe_output_layer(Behind(), torch.randn(4, 6))


def test_one_output_without_its_dimension_leads_to_its_layer():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 1)

        def forward(self, inputs):
            return self.head(inputs).squeeze(-1).clone()

    model = Scalar()
    assert observe_output_layer(model, torch.randn(4, 6)) == LinearLayer(model.head)


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
