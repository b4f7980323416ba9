"""What a rule sees, against gradients by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composer_gradmatch import Candidates


@pytest.mark.parametrize("bias", [True, False])
def test_the_gram_matrix_is_that_of_the_samples_gradients(bias):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=bias).double()
    inputs, targets = torch.randn(6, 4).double(), torch.randint(3, (6,))
    outputs = layer(inputs)
    losses = F.cross_entropy(outputs, targets, reduction="none")
    (grads,) = torch.autograd.grad(losses.sum(), outputs, retain_graph=True)
    each = [torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True) for loss in losses]
    rows = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each])
    candidates = Candidates(6, losses=losses.detach(), inputs=inputs, output_grads=grads, bias=bias)
    torch.testing.assert_close(candidates.gram, rows @ rows.T)


def test_what_nobody_asks_for_is_not_computed_and_the_rest_once():
    asked = []

    def give(name):
        def value():
            asked.append(name)
            return torch.ones(2, 2)

        return value

    candidates = Candidates(
        2, losses=torch.ones(2), inputs=give("inputs"), output_grads=give("grads"), gram=give("gram")
    )
    assert candidates.losses.tolist() == [1, 1]
    assert asked == []
    assert candidates.gram is candidates.gram
    assert asked == ["gram"]
    assert candidates.output_grads is candidates.output_grads
    assert asked == ["gram", "grads"]


@pytest.mark.parametrize("name", ["losses", "inputs", "output_grads", "gram"])
def test_what_was_not_looked_at_is_told_with_the_remedy(name):
    with pytest.raises(ValueError, match="needs='gradients'"):
        getattr(Candidates(3), name)


def test_finite_is_asked_late():
    assert Candidates(1).finite
    assert not Candidates(1, finite=lambda: False).finite


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 2).long()])
def test_labels_that_are_no_classes_are_refused(labels):
    for given in (labels, lambda: labels):
        with pytest.raises(ValueError, match="labels must be integers, one for each of the 3 samples; got torch"):
            Candidates(3, labels=given).labels  # noqa: B018
